"""The teacher of tiny Mask R-CNN: twice as wide, four times as long."""

_base_ = 'mask_rcnn.py'

model = dict(
    backbone=dict(base_channels=16, stem_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128]),
)
train_cfg = dict(max_iters=640)
default_hooks = dict(checkpoint=dict(interval=640))
