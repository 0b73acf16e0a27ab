"""Tiny RetinaNet on Swin, its matrices products of fewer weights."""

_base_ = 'retinanet_swin.py'

teacher = dict(
    config='configs/_base_/tiny/retinanet_swin_teacher.py',
    checkpoint='work_dirs/tiny/teachers/retinanet_swin/iter_640.pth',
)

model = dict(
    type='mmkd.Factorized', detector=_base_.model.type, rank_ratio=0.25
)
param_scheduler = _base_.falling
