"""FGD, global part: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        glob=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.FGDGlobalLoss', channels=32),
        ),
    ),
)
