"""MTPD: a tiny RetinaNet learns from one twice as wide, then from a GFL."""

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
        first=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.MGDLoss', channels=32, loss_weight=0.001),
            schedule=dict(type='mmkd.Between', begin=0.0, end=0.5),
        ),
        second=dict(
            type='mmkd.FeatureTerm',
            teacher='gfl',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.MGDLoss', channels=32, loss_weight=0.001),
            schedule=dict(type='mmkd.Between', begin=0.5, end=1.0),
        ),
    ),
)
