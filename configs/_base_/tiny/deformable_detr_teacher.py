"""The teacher of tiny Deformable DETR: twice as wide before its transformer,
one layer deeper in it, four times as long.
"""

_base_ = 'deformable_detr.py'

model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    neck=dict(in_channels=[32, 64, 128]),
    encoder=dict(num_layers=2),
    decoder=dict(num_layers=3),
)
train_cfg = dict(max_iters=640)
default_hooks = dict(checkpoint=dict(interval=640))
