"""CMKD: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        cmkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.CMKDLoss', num_classes=6, topk=64),
        ),
        box=dict(
            type='mmkd.BoxTerm',
            teacher='big',
            weight=dict(type='mmkd.ScoreWeight'),
            normalise_by='weight',
        ),
    ),
)
