"""Tiny detectors with other dense heads than RetinaNet's."""

from __future__ import annotations

import tiny


def gfl(base: int = tiny.BASE, bins: int = 4, convs: int = 1, **more) -> dict:
    """Box distributions, and labels assigned by ATSS."""
    model = _with_head(
        base,
        'GFL',
        type='GFLHead',
        stacked_convs=convs,
        reg_max=bins - 1,
        anchor_generator=_anchors(base),
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        **more,
    )
    model['train_cfg'] = _by_atss()
    return model


def atss(base: int = tiny.BASE, convs: int = 1, **more) -> dict:
    model = _with_head(
        base,
        'ATSS',
        type='ATSSHead',
        stacked_convs=convs,
        anchor_generator=_anchors(base),
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]
        ),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True),
        **more,
    )
    model['train_cfg'] = _by_atss()
    return model


def retinanet(base: int = tiny.BASE, convs: int = 1, **more) -> dict:
    model = tiny.retinanet(base=base)
    model['bbox_head'].update(stacked_convs=convs, **more)
    return model


def fcos(base: int = tiny.BASE, convs: int = 1, **more) -> dict:
    return _with_head(
        base,
        'FCOS',
        type='FCOSHead',
        stacked_convs=convs,
        strides=_strides(base),
        norm_on_bbox=True,
        **more,
    )


def _with_head(base: int, kind: str, **head) -> dict:
    model = tiny.retinanet(base=base)
    channels = model['bbox_head']['in_channels']
    model['type'] = kind
    model['bbox_head'] = {
        'num_classes': tiny.CLASSES,
        'in_channels': channels,
        'feat_channels': channels,
        'norm_cfg': None,
        **head,
    }
    return model


def _strides(base: int) -> list[int]:
    head = tiny.retinanet(base=base)['bbox_head']
    return head['anchor_generator']['strides']


def _anchors(base: int) -> dict:
    return dict(
        type='AnchorGenerator',
        ratios=[1.0],
        octave_base_scale=8,
        scales_per_octave=1,
        strides=_strides(base),
    )


def _by_atss() -> dict:
    return dict(
        assigner=dict(type='ATSSAssigner', topk=9),
        allowed_border=-1,
        pos_weight=-1,
    )
