"""The teacher of tiny GFL: twice as wide, four times as long."""

_base_ = 'gfl.py'

model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    neck=dict(in_channels=[32, 64, 128]),
)
train_cfg = dict(max_iters=640)
default_hooks = dict(checkpoint=dict(interval=640))
