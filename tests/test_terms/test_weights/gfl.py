"""A tiny GFL, whose head has box distributions and assigns by ATSS."""

import tiny


def gfl(base: int = tiny.BASE, bins: int = 4) -> dict:
    model = tiny.retinanet(base=base)
    channels = model['bbox_head']['in_channels']
    strides = model['bbox_head']['anchor_generator']['strides']
    model.update(type='GFL')
    model['bbox_head'] = dict(
        type='GFLHead',
        num_classes=tiny.CLASSES,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=1,
        norm_cfg=None,
        reg_max=bins - 1,
        anchor_generator=dict(
            type='AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=strides,
        ),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    )
    model['train_cfg'] = dict(
        assigner=dict(type='ATSSAssigner', topk=9),
        allowed_border=-1,
        pos_weight=-1,
    )
    return model
