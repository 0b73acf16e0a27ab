"""Where terms look: masks and attentions over a training's own pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmkd.analysis.pictures import attention_over, mosaic
from mmkd.compat.checkpoint import (
    add_trust_option,
    read_checkpoint,
    state_dict_of,
    trusting,
)
from mmkd.configs import read_config
from mmkd.ops.attention import spatial_attention
from mmkd.ops.masks import background_mask, foreground_mask
from mmkd.randomness import preserved
from mmkd.structures import GroundTruth
from mmkd.taps import maps_of, recording
from mmkd.teachers import run_detector


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``show_focus.py``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='show_focus.py',
        description='Draw foreground, background and attention of student '
        'and teachers over training pictures, augmented as they are.',
    )
    parser.add_argument('config', help='a distillation config')
    parser.add_argument(
        '--checkpoint', help="the student's weights; untrained if not given"
    )
    parser.add_argument('--count', type=int, default=4, help='pictures')
    parser.add_argument('--level', type=int, default=0, help='0: the finest')
    parser.add_argument('--tap', default='neck', help='whose maps are shown')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', default='focus.png')
    add_trust_option(parser)
    options = parser.parse_args(arguments)
    try:
        with trusting(*options.trust_checkpoint):
            path = show(options)
    except (OSError, ValueError) as error:
        print(f'show_focus.py: {error}', file=sys.stderr)
        return 1
    print(f'drawn in {path}')
    return 0


def show(options: argparse.Namespace) -> Path:
    """Build the model of a config and draw what its first batch is."""
    config = read_config(options.config, 'show_focus.py')
    if 'terms' not in config.model:
        raise ValueError(
            f'{options.config} distils nothing: its model has no terms. Name '
            f'a config of type mmkd.Distiller.'
        )
    init_default_scope(config.get('default_scope', 'mmdet'))
    with preserved(options.seed):
        model = MODELS.build(config.model)
        model.init_weights()
        if options.checkpoint:
            state = state_dict_of(read_checkpoint(options.checkpoint))
            model.load_state_dict(state, strict=False)
        dataset = DATASETS.build(config.train_dataloader.dataset)
        count = min(options.count, len(dataset))
        batch = pseudo_collate([dataset[index] for index in range(count)])
        panels = focus(model, batch, options.tap, options.level)
    rows = [list(row) for row in zip(*panels.values())]
    return mosaic(rows, list(panels), options.out)


def focus(
    model: nn.Module, batch: Mapping[str, Any], tap: str, level: int
) -> dict[str, list[np.ndarray]]:
    """Pictures of one batch, each under what is laid over it.

    Args:
        model: A distilled student, teachers loaded.
        batch: As a data loader gives it: ``inputs`` and ``data_samples``.
        tap: Submodule whose maps are shown.
        level: Which of them.

    Returns:
        RGB bytes (H, W, 3), padded as the batch is, by title: the pictures
        alone, foreground and background as FGD weighs them, and the spatial
        attention of the student and of each teacher.

    Raises:
        ValueError: If there is no such tap or level.
    """
    pixels = [_rgb(one) for one in batch['inputs']]
    data = model.data_preprocessor(batch, training=True)
    images, samples = data['inputs'], data['data_samples']
    maps = {'student': _maps(model, images, samples, tap)}
    for name, teacher in model.teachers.items():
        shown = teacher.run(images, samples, model._pixels, [tap])
        maps[name] = maps_of(shown.at(tap), f'The tap {tap!r}')
    for name, found in maps.items():
        if not 0 <= level < len(found):
            raise ValueError(
                f'{tap!r} of {name!r} returns {len(found)} maps, levels 0 to '
                f'{len(found) - 1}; got level={level}.'
            )
    gt = GroundTruth.from_samples(samples, images)
    size = tuple(maps['student'][level].shape[-2:])
    masks = dict(
        foreground=foreground_mask(gt, size),
        background=background_mask(gt, size),
    ) | {
        f'attention of {name}': spatial_attention(found[level])
        for name, found in maps.items()
    }
    height, width = images.shape[-2:]
    canvas = [
        F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2]))
        .permute(1, 2, 0)
        .numpy()
        for one in pixels
    ]
    return {'picture': canvas} | {
        title: [attention_over(one, mask[i]) for i, one in enumerate(canvas)]
        for title, mask in masks.items()
    }


def _maps(
    model: nn.Module, images: Tensor, samples: list, tap: str
) -> tuple[Tensor, ...]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), recording(model, [tap], stop=True) as record:
            run_detector(model, images, samples)
    finally:
        model.train(training)
    return maps_of(record.at(tap), f'The tap {tap!r}')


def _rgb(image: Tensor) -> Tensor:
    """Bytes as they were loaded, BGR, to RGB, (3, H, W)."""
    return image.flip(0).to(torch.uint8).cpu()
