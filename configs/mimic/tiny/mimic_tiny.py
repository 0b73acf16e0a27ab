"""Mimic: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        mimic=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.MimicLoss', loss_weight=2.0),
        ),
    ),
)
