"""NKD: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        nkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.NKDLoss', num_classes=6),
        ),
    ),
)
