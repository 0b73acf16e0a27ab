"""Score-L2: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        score=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2),
            align=dict(
                type='mmkd.ConvAdapt', in_channels=32, out_channels=32, convs=2
            ),
            weight=dict(type='mmkd.ScoreWeight'),
            loss=dict(type='mmkd.WeightedMSELoss'),
        ),
    ),
)
