"""UHKD: a tiny RetinaNet learns the low frequencies of one twice as wide."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        uhkd=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='backbone',
            levels=(0, 1),  # the coarsest has three cells in each direction
            align=dict(
                type='mmkd.SpectralAdapt',
                in_channels=(16, 32),
                out_channels=(32, 64),
            ),
            loss=dict(
                type='mmkd.UHKDLoss',
                grid=(8, 8),
                keep=(6, 6),
                component='complex',
            ),
        ),
        soft_target=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.SoftTargetLoss', num_classes=6),
        ),
    ),
)
