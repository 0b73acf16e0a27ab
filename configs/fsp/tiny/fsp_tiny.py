"""FSP: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        fsp=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.FSPLoss', loss_weight=1.0),
        ),
    ),
)
