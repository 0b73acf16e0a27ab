"""Tiny Faster R-CNN: an eighth-wide ResNet-18, four levels, from scratch."""

_base_ = 'runtime.py'

teacher = dict(
    config='configs/_base_/tiny/faster_rcnn_teacher.py',
    checkpoint='work_dirs/tiny/teachers/faster_rcnn/iter_640.pth',
)

assigner = dict(
    type='MaxIoUAssigner',
    pos_iou_thr=0.5,
    neg_iou_thr=0.5,
    min_pos_iou=0.5,
    ignore_iof_thr=0.5,
)
sampler = dict(
    type='RandomSampler', num=32, pos_fraction=0.25, add_gt_as_proposals=True
)
proposals = dict(
    nms_pre=100,
    max_per_img=50,
    nms=dict(type='nms', iou_threshold=0.7),
    min_bbox_size=0,
)

model = dict(
    type='FasterRCNN',
    data_preprocessor=_base_.pixels,
    backbone=dict(_base_.backbone, out_indices=(0, 1, 2, 3)),
    neck=dict(_base_.neck, in_channels=[8, 16, 32, 64], num_outs=4),
    rpn_head=dict(
        type='RPNHead',
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(
            type='AnchorGenerator',
            scales=[4],
            ratios=[1.0],
            strides=[4, 8, 16, 32],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
    ),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=32,
            featmap_strides=[4, 8, 16, 32],
            finest_scale=14,
        ),
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            in_channels=32,
            fc_out_channels=64,
            num_classes=6,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]
            ),
            loss_cls=dict(type='CrossEntropyLoss'),
            loss_bbox=dict(type='L1Loss'),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                assigner, pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3
            ),
            sampler=dict(sampler, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
        ),
        rpn_proposal=proposals,
        rcnn=dict(assigner=assigner, sampler=sampler, pos_weight=-1),
    ),
    test_cfg=dict(
        rpn=proposals,
        rcnn=dict(
            score_thr=0.02,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=50,
        ),
    ),
)
