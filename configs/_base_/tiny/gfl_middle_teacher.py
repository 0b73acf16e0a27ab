"""Another teacher of tiny GFL: half as wide again, four times as long."""

_base_ = 'gfl.py'

model = dict(
    backbone=dict(base_channels=12, stem_channels=12),
    neck=dict(in_channels=[24, 48, 96]),
)
train_cfg = dict(max_iters=640)
default_hooks = dict(checkpoint=dict(interval=640))
