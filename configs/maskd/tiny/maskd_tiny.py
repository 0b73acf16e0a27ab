"""MasKD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        maskd=dict(
            type='mmkd.LearnedMaskTerm',
            teacher='big',
            levels=(0, 1, 2),
            loss=dict(type='mmkd.MasKDLoss', channels=32),
            learn_until=1.0,
        ),
        boxes=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=1,
            loss=dict(type='mmkd.MimicLoss', distance='absolute'),
        ),
    ),
)
