"""ReviewKD: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        reviewkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            loss=dict(
                type='mmkd.ReviewKDLoss',
                in_channels=(32, 32, 32),
                mid_channels=32,
            ),
        ),
    ),
)
