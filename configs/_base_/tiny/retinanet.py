"""Tiny RetinaNet: an eighth-wide ResNet-18 with three levels, from scratch."""

_base_ = 'runtime.py'

teacher = dict(
    config='configs/_base_/tiny/retinanet_teacher.py',
    checkpoint='work_dirs/tiny/teachers/retinanet/iter_640.pth',
)

model = dict(
    type='RetinaNet',
    data_preprocessor=_base_.pixels,
    backbone=_base_.backbone,
    neck=_base_.neck,
    bbox_head=dict(
        type='RetinaHead',
        num_classes=6,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        norm_cfg=dict(type='GN', num_groups=8, requires_grad=True),
        anchor_generator=dict(
            type='AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=3,
            scales_per_octave=2,
            strides=[8, 16, 32],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
    ),
    train_cfg=dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=0.5,
            neg_iou_thr=0.4,
            min_pos_iou=0,
            ignore_iof_thr=0.5,
        ),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=200,
        min_bbox_size=0,
        score_thr=0.02,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=50,
    ),
)
