"""Write what a dense teacher predicts in its surest cells of each image."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mmdet.models.dense_heads import YOLOXHead
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmkd.analysis.offline import (
    EVERY,
    add_images,
    check_weights,
    command,
    fingerprint,
    images_of,
    loaded,
    store_goes_on,
    typed,
)
from mmkd.configs import read_config
from mmkd.memory import GIB
from mmkd.store import PREDICTING, PREDICTIONS, Store, room_of
from mmkd.taps import maps_of, recording, resolve
from mmkd.teachers import Teacher, run_detector
from mmkd.terms.decoding import (
    anchors_of,
    check_decodable,
    decode,
    edge_bins,
    edge_origins,
    stride_of,
)

WHO = 'cache_predictions.py'
#: A probability of 0 or 1 has no logit.
EPS = 1e-6


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``tools/cache_predictions.py``."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    options.command = typed('tools/cache_predictions.py', given)
    return command(make, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=WHO, description=__doc__)
    parser.add_argument('config', help="the teacher's config")
    parser.add_argument('checkpoint', help='its weights, file or address')
    parser.add_argument('--out', type=Path, required=True, help='the folder')
    parser.add_argument(
        '--cells',
        type=int,
        default=100,
        help='how many of an image are kept (default: %(default)s)',
    )
    parser.add_argument(
        '--classes',
        type=int,
        default=5,
        help='how many scores of a cell are kept (default: %(default)s)',
    )
    parser.add_argument(
        '--limit',
        type=float,
        default=50.0,
        help='gibibytes that it may take (default: %(default)s)',
    )
    parser.add_argument(
        '--edges',
        action=argparse.BooleanOptionalAction,
        help='keep how each edge of a box is distributed (default: where the '
        'head says so, as those of GFL do)',
    )
    parser.add_argument('--tap', default='bbox_head', help='its dense head')
    add_images(parser)
    return parser


def make(options: argparse.Namespace) -> None:
    """Make the folder, or go on with one that was interrupted.

    Raises:
        FileExistsError: If there is one of other settings, weights or data.
        ValueError: If the teacher has no dense head of sigmoids whose boxes
            can be read, or there is no room.
    """
    if min(options.cells, options.classes) < 1:
        raise ValueError(
            f'{WHO} keeps at least one cell and one class, got --cells '
            f'{options.cells} --classes {options.classes}.'
        )
    check_weights(WHO, [options.checkpoint])
    init_default_scope('mmdet')
    config = read_config(options.config, WHO)
    dataset = images_of(config, options)
    teacher = loaded(options, options.checkpoint)
    head, _ = resolve(teacher.detector, options.tap)
    check_decodable(WHO, head, 'teacher')
    if not getattr(head, 'use_sigmoid_cls', False):
        raise ValueError(
            f'{WHO} keeps a probability for each class by itself, and '
            f'{type(head).__name__} has none. tools/make_hypotheses.py keeps '
            f'the boxes of any teacher.'
        )
    if options.edges is None:
        options.edges = edge_bins(head) > 0
    if options.edges and not edge_bins(head):
        raise ValueError(
            f'{WHO} --edges keeps the edges of boxes as distributions, and '
            f'{type(head).__name__} gives none. Leave --edges out, or take a '
            f'teacher with a head of distributions, such as GFL.'
        )
    about = dict(
        fingerprint=fingerprint(config, dataset, [teacher]),
        cells=options.cells,
        scores=options.classes,
        edges=edge_bins(head) if options.edges else 0,
        taps=[PREDICTIONS],
        classes=list(dataset.metainfo['classes']),
        precision='fp32',
        complete=False,
        command=options.command,
    )
    store = Store(options.out, WHO, tool=PREDICTING)
    if not store_goes_on(WHO, store, options, about):
        shutil.rmtree(options.out, ignore_errors=True)
    store.begin(about, int(options.limit * GIB))
    began = told = time.monotonic()
    for index in range(len(dataset)):
        name = str(dataset.get_data_info(index)['img_id']).encode()
        if store.read(name, [PREDICTIONS], 'cpu') is not None:
            continue
        found = surest(teacher, dataset[index], options)
        store.write(name, {PREDICTIONS: found})
        now = time.monotonic()
        if index == 0:
            needed = room_of(found, 'fp32') * len(dataset)
            print(f'about {needed / 2**20:.0f} MiB', flush=True)
        if now - told > EVERY:
            told, left = now, (now - began) * (len(dataset) / (index + 1) - 1)
            print(
                f'{index + 1} of {len(dataset)} images, about '
                f'{left / 60:.0f} min left',
                flush=True,
            )
    store.tell(dict(about, complete=True))
    print(f'{options.out}: {len(store)} images, {store.size / 2**20:.1f} MiB')
    store.close()


@torch.no_grad()
def surest(
    teacher: Teacher, data: dict, options: argparse.Namespace
) -> dict[str, Tensor]:
    """What a teacher predicts where it is surest.

    Args:
        teacher: With a dense head of sigmoids.
        data: An image, as the data set of tests gives it.
        options: ``cells`` and ``classes``, how many are kept at most,
            ``edges``, whether the distributions of theirs are, and ``tap``,
            the head.

    Returns:
        As :func:`mmkd.datasets.tracking.moved` takes it, in pixels of the
        image as stored, the surest first.
    """
    detector = teacher.detector
    made = detector.data_preprocessor(pseudo_collate([data]), False)
    images, samples = made['inputs'], made['data_samples']
    with recording(detector, [options.tap], stop=True) as record:
        run_detector(detector, images, samples)
    head, _ = resolve(detector, options.tap)
    outputs = record.at(options.tap)
    logits, boxes = (maps_of(outputs, WHO, place) for place in (0, 1))
    logits = [
        one.unflatten(1, (anchors_of(head, level), -1))
        for level, one in enumerate(logits)
    ]  # of each level (1, A, K, H, W)
    if isinstance(head, YOLOXHead):
        objects = maps_of(outputs, WHO, 2)
        logits = [
            (one.sigmoid() * other[:, :, None].sigmoid()).logit(EPS)
            for one, other in zip(logits, objects)
        ]
    height, width = samples[0].img_shape[:2]
    found = [
        _of_level(one, box, stride_of(head, level), (height, width))
        for level, (one, box) in enumerate(zip(logits, decode(head, boxes)))
    ]
    logits, corners, points, strides, inside = map(torch.cat, zip(*found))
    kept = inside.nonzero()[:, 0]
    best = logits[kept].amax(1)
    kept = kept[best.topk(min(options.cells, len(best))).indices]
    logits, labels = logits[kept].topk(min(options.classes, logits.shape[1]))
    scale = points.new_tensor(samples[0].metainfo.get('scale_factor', (1, 1)))
    said = dict(
        points=points[kept] / scale,
        strides=strides[kept] / scale.log().mean().exp(),
        bboxes=corners[kept] / scale.repeat(2),
        labels=labels.short(),
        logits=logits.half(),
    )
    if options.edges:
        edges, origins = _edges(head, boxes)
        said.update(
            edges=edges[kept].half(),
            origins=origins[kept] / scale,
            steps=strides[kept, None] / scale,
        )
    return said


def _of_level(
    logits: Tensor, boxes: Tensor, stride: float, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What is predicted, anchor by anchor, and whether within the image."""
    anchors, classes, rows, columns = logits.shape[1:]
    y, x = torch.meshgrid(
        (torch.arange(rows, device=logits.device) + 0.5) * stride,
        (torch.arange(columns, device=logits.device) + 0.5) * stride,
        indexing='ij',
    )
    points = torch.stack([x, y], -1).expand(anchors, -1, -1, -1)
    points = points.reshape(-1, 2)
    inside = (points < points.new_tensor([size[1], size[0]])).all(1)
    sides = torch.full_like(points[:, 0], stride)
    logits = logits[0].movedim(1, -1).reshape(-1, classes)
    boxes = boxes[0].movedim(1, -1).reshape(-1, 4)
    return logits, boxes, points, sides, inside


def _edges(head: nn.Module, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of edges, (M, 4, B), and where they are measured from, (M, 2)."""
    sizes = [tuple(one.shape[-2:]) for one in maps]
    priors = head.prior_generator.grid_priors(sizes, device=maps[0].device)
    edges, origins = [], []
    for level, (one, prior) in enumerate(zip(maps, priors)):
        anchors = anchors_of(head, level)
        logits = one[0].unflatten(0, (anchors, 4, edge_bins(head)))
        edges.append(logits.movedim((1, 2), (-2, -1)).flatten(0, 2))
        centres = edge_origins(head, prior).unflatten(0, (-1, anchors))
        origins.append(centres.transpose(0, 1).flatten(0, 1))
    return torch.cat(edges).float(), torch.cat(origins)
