"""Tiny RetinaNets on Swin, whole and of thin matrices."""

from __future__ import annotations

import tiny

SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=[1, 1, 1, 1],
    num_heads=[1, 2, 4, 8],
    window_size=4,
    drop_path_rate=0.0,
    out_indices=(1, 2, 3),
)


def swin(**settings):
    """RetinaNet on a Swin of four blocks, with settings of the Swin."""
    model = tiny.retinanet()
    model.backbone = dict(SWIN, **settings)
    model.neck.update(in_channels=[16, 32, 64], start_level=0)
    return model


def thin(ratio=0.5, **settings):
    """Its factorized form."""
    return dict(
        swin(), type='mmkd.Factorized', detector='RetinaNet', **settings
    ) | dict(rank_ratio=ratio)
