"""BCCD: EfficientNet-Lite0 with its ImageNet weights, on all 205 labels."""

_base_ = 'student.py'

iterations = 800

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
    data_preprocessor=dict(std=[128, 128, 128]),
    neck=dict(in_channels=[40, 112, 320]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_iters=iterations, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=30,
        end=iterations,
        T_max=iterations - 30,
        eta_min=1e-5,
    ),
]
default_hooks = dict(checkpoint=dict(interval=400))
