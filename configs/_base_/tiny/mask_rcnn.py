"""Tiny Mask R-CNN: Faster R-CNN whose objects are the ellipses in boxes."""

_base_ = 'faster_rcnn.py'

teacher = dict(
    config='configs/_base_/tiny/mask_rcnn_teacher.py',
    checkpoint='work_dirs/tiny/teachers/mask_rcnn/iter_640.pth',
)
train_pipeline = [
    *_base_.train_pipeline[:-1],
    dict(type='mmkd.EllipseMasks'),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

model = dict(
    type='MaskRCNN',
    roi_head=dict(
        mask_roi_extractor=_base_.model.roi_head.bbox_roi_extractor,
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=32,
            conv_out_channels=32,
            num_classes=6,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
        ),
    ),
    train_cfg=dict(rcnn=dict(mask_size=14)),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)
