"""UHKD: a tiny RetinaNet on ResNet learns the low frequencies of a Swin's."""

_base_ = '../../_base_/tiny/retinanet.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(
        swin=dict(
            config='configs/_base_/tiny/retinanet_swin_teacher.py',
            checkpoint='work_dirs/tiny/teachers/retinanet_swin/iter_640.pth',
        )
    ),
    terms=dict(
        uhkd=dict(
            type='mmkd.FeatureTerm',
            teacher='swin',
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
            teacher='swin',
            tap='bbox_head',
            output=0,
            loss=dict(type='mmkd.SoftTargetLoss', num_classes=6),
        ),
    ),
)
