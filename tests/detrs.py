"""Tiny detectors of queries: the DETR family, from mmdet's own configs."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from torch import nn

from mmkd.structures import Step
from mmkd.taps import recording
from mmkd.teachers import run_detector

#: The configs, by what tests call them.
CONFIGS = dict(
    detr='detr/detr_r50_8xb2-150e_coco.py',
    conditional='conditional_detr/conditional-detr_r50_8xb2-50e_coco.py',
    dab='dab_detr/dab-detr_r50_8xb2-50e_coco.py',
    deformable='deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    refine='deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py',
    two_stage='deformable_detr/'
    'deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
    dino='dino/dino-4scale_r50_8xb2-12e_coco.py',
    ddq='ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py',
)

#: Those whose width is written into mmdet.
WIDE = ('conditional', 'two_stage', 'dino')


def detr(
    kind: str = 'dino',
    base: int = tiny.BASE,
    queries: int = 12,
    layers: int = 2,
    classes: int = tiny.CLASSES,
) -> ConfigDict:
    """A member of the family, at a size for milliseconds.

    Args:
        kind: A key of :data:`CONFIGS`.
        base: Channels of the backbone's stem.
        queries: How many.
        layers: Of encoder and decoder each.
        classes: To tell apart.
    """
    model = get_config(f'mmdet::{CONFIGS[kind]}').model
    width = 256 if kind in WIDE else 16
    stages = model.backbone.out_indices
    model.backbone = tiny.backbone(base)
    model.backbone.update(out_indices=stages)
    model.data_preprocessor = tiny.PIXELS
    model.num_queries = queries
    model.bbox_head.update(num_classes=classes, embed_dims=width)
    model.test_cfg.max_per_img = queries
    model.neck.in_channels = [base * 2**stage for stage in stages]
    for part in (model.encoder, model.decoder):
        part.num_layers = layers
    groups = model.neck.get('norm_cfg')
    if groups:
        groups.num_groups = 4
    _narrow(model, width)
    if 'dn_cfg' in model:
        model.dn_cfg.group_cfg.num_dn_queries = 4
    return model


def _narrow(config: Any, width: int) -> None:
    sizes = dict(
        embed_dims=width,
        out_channels=width,
        feedforward_channels=2 * width,
        num_heads=4,
        num_feats=width // 2,
    )
    for key, value in config.items():
        if key in sizes:
            config[key] = sizes[key]
        elif key in ('self_attn_cfg', 'cross_attn_cfg'):
            value.num_heads = 4
            _narrow(value, width)
        elif isinstance(value, dict):
            _narrow(value, width)


class Shown:
    """A teacher as terms see it while they are bound."""

    memory = None

    def __init__(self, detector: nn.Module) -> None:
        self.detector = detector
        self.paths: list[str] = []

    def tap(self, path: str) -> None:
        self.paths.append(path)


def built(kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A tiny detector in which nothing is dropped and BatchNorm rests."""
    model = tiny.build(detr(kind, **settings), seed)
    if getattr(model, 'query_embedding', None) is not None:  # told apart
        nn.init.normal_(model.query_embedding.weight)
    for one in model.modules():
        if isinstance(one, nn.Dropout):
            one.p = 0
        if isinstance(one, nn.MultiheadAttention):
            one.dropout = 0
    model.backbone.norm_eval = True
    return model.train()


def step_of(
    term: nn.Module,
    student: nn.Module,
    teacher: nn.Module,
    batch: tuple | None = None,
) -> Step:
    """What a term sees of a step, without a distiller around it."""
    shown = Shown(teacher.eval().requires_grad_(False))
    term.bind(student, dict(big=shown))
    images, samples = batch or tiny.batch()
    with recording(student, term.student_paths) as own:
        student.loss(images, samples)
    with torch.no_grad(), recording(teacher, shown.paths) as other:
        run_detector(teacher, images, samples)
    return Step(
        student=own,
        images=images,
        samples=samples,
        teachers=dict(big=lambda *_: other),
    )


def reorder(model: nn.Module, order: torch.Tensor) -> nn.Module:
    """Put a detector's queries into another order."""
    weight = model.query_embedding.weight
    weight.data = weight.data[order]
    return model
