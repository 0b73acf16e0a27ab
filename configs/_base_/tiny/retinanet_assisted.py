"""Tiny RetinaNet, its backbone cut into one and an assistant half as wide."""

_base_ = 'retinanet.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmkd.ResidualBackbone',
        main=dict(_base_.backbone, base_channels=6, stem_channels=6),
        assistant=dict(_base_.backbone, base_channels=3, stem_channels=3),
        out_channels=(32, 64, 128),
    ),
    neck=dict(in_channels=[32, 64, 128]),
)
