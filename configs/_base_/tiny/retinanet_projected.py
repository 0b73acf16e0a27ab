"""Tiny RetinaNet with a projector behind the neck."""

_base_ = 'retinanet.py'

model = dict(
    neck=[
        _base_.neck,
        dict(
            type='mmkd.SimKDProjector',
            in_channels=32,
            out_channels=32,
            num_levels=3,
        ),
    ]
)
