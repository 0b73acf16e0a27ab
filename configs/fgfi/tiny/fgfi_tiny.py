"""FGFI: a tiny GFL learns from one twice as wide."""

_base_ = '../../_base_/tiny/gfl.py'

model = dict(
    type='mmkd.Distiller',
    student=_base_.model.type,
    teachers=dict(big=_base_.teacher),
    terms=dict(
        fgfi=dict(
            type='mmkd.FeatureTerm',
            teacher='big',
            levels=(0, 1, 2),
            align=dict(type='mmkd.ConvAdapt', in_channels=32, out_channels=32),
            loss=dict(
                type='mmkd.FGFILoss',
                anchor_generator=_base_.model.bbox_head.anchor_generator,
                loss_weight=0.06,
            ),
        ),
    ),
)
