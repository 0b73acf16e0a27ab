"""The teacher of RetinaNet on narrow Swin: wider, deeper, and longer."""

_base_ = 'retinanet_slim_swin.py'

model = dict(
    backbone=dict(embed_dims=16, depths=[2, 2, 4, 2], num_heads=[2, 4, 8, 16]),
    neck=dict(in_channels=[32, 64, 128]),
)
train_cfg = dict(max_iters=640)
default_hooks = dict(checkpoint=dict(interval=640))
