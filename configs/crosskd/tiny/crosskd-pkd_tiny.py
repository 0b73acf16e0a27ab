"""CrossKD and PKD: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        cross=dict(
            type='mmkd.CrossHeadTerm', teacher='big', convs=1, box_weight=4.0
        ),
        pkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(type='mmkd.PKDLoss', loss_weight=6.0),
        ),
    ),
)
