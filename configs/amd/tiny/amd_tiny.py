"""AMD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        amd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.AMDLoss', channels=32, loss_weight=0.001),
        ),
    ),
)
