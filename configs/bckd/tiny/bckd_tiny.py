"""BCKD: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        bckd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.BCKDClassLoss', num_classes=6),
        ),
        box=dict(
            type='mmkd.BoxTerm',
            teacher='big',
            weight=dict(type='mmkd.DisagreementWeight'),
            loss_weight=4.0,
        ),
    ),
)
