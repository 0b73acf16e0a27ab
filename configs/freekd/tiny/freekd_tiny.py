"""FreeKD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        freekd=dict(
            type='mmkd.LearnedMaskTerm',
            teacher='big',
            levels=(0, 1),
            loss=dict(
                type='mmkd.FreeKDLoss',
                channels=32,
                scales=2,
                position='teacher',
            ),
            learn_until=1.0,
        ),
        boxes=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=1,
            loss=dict(type='mmkd.MimicLoss', distance='smooth'),
        ),
    ),
)
