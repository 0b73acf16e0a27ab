"""FGD, focal part: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        focal=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.FGDFocalLoss'),
        ),
    ),
)
