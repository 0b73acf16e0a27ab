"""DeFeat with proposals: a tiny Faster R-CNN learns from one twice as wide."""

_base_ = '../../_base_/tiny/faster_rcnn.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        defeat=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2, 3),
            align=dict(
                type='mmkd.ConvAdapt',
                in_channels=32,
                out_channels=32,
                kernel_size=3,
            ),
            loss=dict(
                type='mmkd.DeFeatLoss',
                foreground_weight=3.0,
                background_weight=12.0,
            ),
        ),
        proposal=dict(
            type='mmkd.ProposalTerm',
            teacher='big',
            positive_weight=2.0,
            negative_weight=2.0,
        ),
    ),
)
