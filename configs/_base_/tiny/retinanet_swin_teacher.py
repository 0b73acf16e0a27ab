"""The teacher of its factorized self: tiny RetinaNet on Swin, longer."""

_base_ = 'retinanet_swin.py'

train_cfg = dict(max_iters=640)
default_hooks = dict(checkpoint=dict(interval=640))
