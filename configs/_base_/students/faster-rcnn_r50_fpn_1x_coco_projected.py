"""Faster R-CNN R-50 as in the zoo, with a projector behind the neck."""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

model = dict(
    neck=[
        _base_.model.neck,
        dict(
            type='mmkd.SimKDProjector',
            in_channels=256,
            out_channels=256,
            num_levels=5,
        ),
    ]
)
