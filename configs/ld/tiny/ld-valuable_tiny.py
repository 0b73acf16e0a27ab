"""LD with the valuable region: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        main=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.PositiveWeight'),
            loss=dict(type='mmkd.LDLoss', temperature=10.0, loss_weight=0.25),
        ),
        valuable=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=1,
            weight=dict(type='mmkd.ValuableWeight'),
            loss=dict(type='mmkd.LDLoss', temperature=10.0, loss_weight=0.25),
        ),
    ),
)
