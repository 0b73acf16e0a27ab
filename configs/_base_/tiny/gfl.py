"""Tiny GFL: an eighth-wide ResNet-18 with three levels, from scratch."""

_base_ = 'runtime.py'

teacher = dict(
    config='configs/_base_/tiny/gfl_teacher.py',
    checkpoint='work_dirs/tiny/teachers/gfl/iter_640.pth',
)
middle_teacher = dict(
    config='configs/_base_/tiny/gfl_middle_teacher.py',
    checkpoint='work_dirs/tiny/teachers/gfl_middle/iter_640.pth',
)

model = dict(
    type='GFL',
    data_preprocessor=_base_.pixels,
    backbone=_base_.backbone,
    neck=_base_.neck,
    bbox_head=dict(
        type='GFLHead',
        num_classes=6,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
        reg_max=8,
        anchor_generator=dict(
            type='AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=3,
            scales_per_octave=1,
            strides=[8, 16, 32],
        ),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        assigner=dict(type='ATSSAssigner', topk=9, ignore_iof_thr=0.5),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=200,
        min_bbox_size=0,
        score_thr=0.02,
        nms=dict(type='nms', iou_threshold=0.6),
        max_per_img=50,
    ),
)
