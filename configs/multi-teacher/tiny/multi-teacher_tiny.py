"""Multi: a tiny RetinaNet learns from one twice as wide and a GFL."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        big=_base_.teacher,
        gfl=dict(
            config='configs/_base_/tiny/gfl_teacher.py',
            checkpoint='work_dirs/tiny/teachers/gfl/iter_640.pth',
        ),
    ),
    terms=dict(
        big=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.PKDLoss', loss_weight=5.0),
        ),
        gfl=dict(
            type='mmkd.FeatureTerm',
            teacher='gfl',
            loss=dict(type='mmkd.PKDLoss', loss_weight=5.0),
        ),
    ),
)
