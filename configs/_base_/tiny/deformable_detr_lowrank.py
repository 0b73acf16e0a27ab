"""The teacher of tiny Deformable DETR, its matrices of fewer weights."""

_base_ = 'deformable_detr_teacher.py'

model = dict(
    type='mmkd.Factorized',
    detector=_base_.model.type,
    rank_ratio=0.25,
    parts=('encoder', 'decoder'),
    backbone=dict(frozen_stages=1),  # as in the zoo; it is the teacher's
)
train_cfg = dict(max_iters=_base_.iterations)
default_hooks = dict(checkpoint=dict(interval=_base_.iterations))
param_scheduler = _base_.falling
