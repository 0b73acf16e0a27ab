"""FRS: a tiny RetinaNet learns from one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        feature=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2),
            align=dict(
                type='mmkd.ConvAdapt',
                in_channels=32,
                out_channels=32,
                kernel_size=3,
            ),
            weight=dict(type='mmkd.ScoreWeight'),
            loss=dict(type='mmkd.WeightedMSELoss', loss_weight=1.28),
        ),
        scores=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(
                type='mmkd.SoftTargetLoss', num_classes=6, loss_weight=0.02
            ),
        ),
    ),
)
