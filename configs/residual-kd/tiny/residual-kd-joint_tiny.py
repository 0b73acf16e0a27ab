"""Residual-KD: a tiny RetinaNet with an assistant, all at once."""

_base_ = '../../_base_/tiny/retinanet_assisted.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        main=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='backbone.main',
            teacher_tap='backbone',
            loss=dict(type='mmkd.MimicLoss'),
        ),
        residual=dict(type='mmkd.ResidualTerm', teacher='big'),
    ),
)
