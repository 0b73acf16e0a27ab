"""Where terms look: masks and attentions over a training's own pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from mmkd.datasets.photographs import PartlyLabelledDataset
from mmkd.ops.attention import spatial_attention
from mmkd.ops.masks import background_mask, foreground_mask
from mmkd.randomness import preserved
from mmkd.structures import GroundTruth, Step
from mmkd.taps import maps_of, recording, resolve
from mmkd.teachers import run_detector
from mmkd.terms.weights.positive import PositiveWeight
from mmkd.terms.weights.score import ScoreWeight
from mmkd.terms.weights.valuable import ValuableWeight
from mmkd.terms.weights.weight import Weight

#: Where a detector's dense head is, of one stage and of two.
HEADS = ('bbox_head', 'rpn_head')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``show_focus.py``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='show_focus.py',
        description='Draw foreground, background, attention, richness, '
        'positives and the valuable region, and what the terms of a config '
        'weigh by, over training pictures, augmented as they are.',
    )
    parser.add_argument('config', help='a distillation config')
    parser.add_argument(
        '--checkpoint', help="the student's weights; untrained if not given"
    )
    parser.add_argument(
        '--count',
        type=int,
        default=4,
        help='pictures, from all over the training set',
    )
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
        if isinstance(dataset, PartlyLabelledDataset):
            dataset = dataset.datasets[0]  # nothing is positive in the others
        chosen = spaced(len(dataset), options.count)
        batch = pseudo_collate([dataset[index] for index in chosen])
        panels = focus(model, batch, options.tap, options.level)
    rows = [list(row) for row in zip(*panels.values())]
    return mosaic(rows, list(panels), options.out)


def spaced(size: int, count: int) -> list[int]:
    """Indices from all over a data set, as far from each other as they can.

    Example:
        >>> spaced(100, 4), spaced(2, 4)
        ([12, 37, 62, 87], [0, 1])
    """
    count = min(count, size)
    return [(2 * place + 1) * size // (2 * count) for place in range(count)]


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
        alone; foreground and background as FGD weighs them; the spatial
        attention of the student and of each teacher; of dense heads, how
        likely an object is at each cell (FRS's richness), the student's
        positives and LD's valuable region; and the weights of the terms. The
        last ones are those of a training step, which the model makes.

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
    )
    attention = {
        f'attention of {name}': spatial_attention(found[level])
        for name, found in maps.items()
    }
    weights = _weights(model, images, samples, level)
    height, width = images.shape[-2:]
    canvas = [
        F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2]))
        .permute(1, 2, 0)
        .numpy()
        for one in pixels
    ]
    return dict(picture=canvas) | {
        title: [
            attention_over(one, heat[i], from_zero=title not in attention)
            for i, one in enumerate(canvas)
        ]
        for title, heat in (masks | attention | weights).items()
    }


def _weights(
    model: nn.Module, images: Tensor, samples: list, level: int
) -> dict[str, Tensor]:
    """How much cells of a level count in a training step, (N, 1, h, w)."""
    looks = model.observer = _Looks(model)
    try:
        model.train().loss(images, samples)
    finally:
        model.observer = None
    return {
        title: maps[level].amax(1, keepdim=True)
        for title, maps in looks.maps.items()
        if level < len(maps)
    }


class _Looks:
    """Keeps what every weight is in a step that it observes."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, tuple[Weight, list[str]]] = {}
        self.maps: dict[str, Sequence[Tensor]] = {}
        for title, weight, teacher in _every_weight(model):
            taps = _Taps()
            with _telling(title):
                weight.bind(taps, model, model.teachers[teacher])
                self.found[title] = weight, taps.paths

    @property
    def paths(self) -> list[str]:
        return [path for _, paths in self.found.values() for path in paths]

    def __call__(self, step: Step, losses: Mapping[str, Any]) -> None:
        for title, (weight, paths) in self.found.items():
            # Not all of them are reached in a phase without labels.
            if all(step.student.has(path) for path in paths):
                with _telling(title):
                    self.maps[title] = weight(step)


@contextmanager
def _telling(title: str) -> Iterator[None]:
    """Say why something is not drawn, and go on."""
    try:
        yield
    except ValueError as error:
        print(f'Not drawn, {title}: {error}')


class _Taps:
    """Notes what a weight reads of the student, in place of its term."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def tap(self, student: nn.Module, path: str) -> None:
        resolve(student, path)
        self.paths.append(path)


def _every_weight(model: nn.Module) -> Iterator[tuple[str, Weight, str]]:
    """Titles, weights, and the names of their teachers."""
    own = _dense_head(model)
    for name, teacher in model.teachers.items():
        head = _dense_head(teacher.detector)
        if head is not None:
            yield f'richness of {name}', ScoreWeight(tap=head), name
    for name in list(model.teachers)[:1] if own is not None else ():
        yield 'richness of student', ScoreWeight('student', own), name
        yield 'positives', PositiveWeight(own, score=False), name
        yield 'valuable region', ValuableWeight(own), name
    for name, term in model.terms.items():
        for part in term.modules():
            if isinstance(part, Weight):
                yield f'{name}: {type(part).__name__}', part, part.teacher


def _dense_head(detector: nn.Module) -> str | None:
    for path in HEADS:
        head = getattr(detector, path, None)
        if hasattr(head, 'prior_generator') and hasattr(
            head, 'cls_out_channels'
        ):
            return path
    return None


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
