"""RetinaNet R-18 as in the zoo, with a projector behind the neck."""

_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'

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
