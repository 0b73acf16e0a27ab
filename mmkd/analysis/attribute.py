"""Write which pixels a teacher's scores go back to, one map an image."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.models.dense_heads import TOODHead
from mmdet.structures.bbox import bbox_overlaps
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from torch import Tensor

from mmkd.analysis.offline import (
    EVERY,
    add_images,
    check_weights,
    command,
    fingerprint,
    goes_on,
    images_of,
    loaded,
)
from mmkd.configs import read_config
from mmkd.datasets.attribution import INDEX, map_file
from mmkd.files import check_free, whole
from mmkd.ops.integrated_gradients import blurred, integrated_gradients
from mmkd.reading import read_json
from mmkd.structures import GroundTruth
from mmkd.teachers import Teacher
from mmkd.terms.decoding import decodable
from mmkd.terms.seen import seen

#: Where the path begins: the mean colour, or the image without its details.
BASELINES = ('zero', 'blur')
#: Settings that say which maps they are; others change nothing in them.
SETTINGS = ('steps', 'baseline', 'topk', 'size')
#: The head that is explained.
HEAD = 'bbox_head'
WHO = 'attribute.py'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``tools/attribute.py``."""
    return command(make, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=WHO, description=__doc__)
    parser.add_argument('config', help="the teacher's config")
    parser.add_argument('checkpoint', help='its weights, a file or an address')
    parser.add_argument('--out', required=True, help='the folder of the maps')
    parser.add_argument(
        '--steps', type=int, default=32, help='points of the path'
    )
    parser.add_argument(
        '--baseline',
        choices=BASELINES,
        default='zero',
        help='where it begins: the mean colour, or the image blurred',
    )
    parser.add_argument(
        '--topk',
        type=int,
        default=10,
        help='scores explained in an image without objects',
    )
    parser.add_argument(
        '--size', type=int, default=256, help="longest side of a map's file"
    )
    parser.add_argument(
        '--batch', type=int, default=4, help='points seen at once'
    )
    add_images(parser)
    return parser


def make(options: argparse.Namespace) -> None:
    """Make the maps, or go on where they were interrupted.

    Raises:
        FileExistsError: If there are maps of other settings, weights or data,
            or other files under their names, and ``overwrite`` is not set.
        ValueError: If a number is below 1, or the teacher has no head of
            dense scores and boxes.
    """
    for name in ('steps', 'topk', 'size', 'batch'):
        if getattr(options, name) < 1:
            raise ValueError(
                f'{WHO} needs --{name} of 1 or more, got '
                f'{getattr(options, name)}. Leave it out for the default.'
            )
    check_weights(WHO, [options.checkpoint])
    init_default_scope('mmdet')
    config = read_config(options.config, WHO)
    dataset = images_of(config, options)
    teacher = loaded(options, options.checkpoint)
    check_explainable(teacher)
    teacher.tap(HEAD)
    info = dict(
        {name: getattr(options, name) for name in SETTINGS},
        fingerprint=fingerprint(config, dataset, [teacher], annotated=True),
        complete=False,
    )
    files = [
        map_file(options.out, dataset.get_data_info(index)['img_id'])
        for index in range(len(dataset))
    ]
    _begin(options, info, files)
    told = time.monotonic()
    for index, file in enumerate(files):
        if not file.is_file():
            write_map(file, explain(teacher, dataset, index, options))
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            print(f'{index + 1} of {len(dataset)} images', flush=True)
    _write_index(options, dict(info, complete=True))
    print(f'{options.out}: {len(files)} maps')


def _begin(
    options: argparse.Namespace, info: Mapping[str, Any], files: list[Path]
) -> None:
    """Leave the maps that are to be kept, and an index that says so."""
    index = Path(options.out, INDEX)
    if index.is_file():
        theirs = read_json(index, WHO, kind=dict)
        if goes_on(WHO, options, info, theirs):
            return
    else:
        check_free(*files, overwrite=options.overwrite)
    # Maps of two commands never stand beside an index.
    index.unlink(missing_ok=True)
    for file in files:
        file.unlink(missing_ok=True)
    _write_index(options, info)


def _write_index(options: argparse.Namespace, info: Mapping[str, Any]) -> None:
    path = Path(options.out, INDEX)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(json.dumps(info, indent=2))


def write_map(file: Path, heat: np.ndarray) -> None:
    """Write a map in [0, 1] as a grey picture, whole or not at all."""
    values = (255 * heat).round().astype(np.uint8)
    _, coded = cv2.imencode('.png', values)
    with whole(file, durable=False) as part:
        part.write_bytes(coded.tobytes())


def check_explainable(teacher: Teacher) -> None:
    """The teacher must have one head of dense scores and boxes.

    Raises:
        ValueError: If it has none.
    """
    head = getattr(teacher.detector, HEAD, None)
    # TOOD's scores are no logits, and its boxes come with them.
    if not decodable(head) or isinstance(head, TOODHead):
        found = type(head).__name__ if head is not None else 'none'
        raise ValueError(
            f'{WHO} explains detectors of one stage whose {HEAD} scores '
            f'every cell, but {type(teacher.detector).__name__} has '
            f'{found}. The student may be of any kind: name a RetinaNet, '
            f'FCOS, ATSS, GFL, RTMDet or YOLOX of the same classes.'
        )


# ------------------------------------------------------------------- one image


def explain(
    teacher: Teacher,
    dataset: Any,
    index: int,
    options: argparse.Namespace,
) -> np.ndarray:
    """The map of one image, (h, w) in [0, 1], reduced.

    Args:
        teacher: Loaded, its head among its taps.
        dataset: Images with their annotations as they are stored.
        index: Of the image.
        options: Of the command.
    """
    data = teacher.detector.data_preprocessor(
        pseudo_collate([dataset[index]]), False
    )
    image = data['inputs'][0]  # 3, H, W
    meta = data['data_samples'][0].new(data={})
    height, width = meta.img_shape[:2]
    info = dataset.get_data_info(index)
    baseline = torch.zeros_like(image)
    if options.baseline == 'blur':
        baseline = image.clone()
        baseline[:, :height, :width] = blurred(image[:, :height, :width])
    score = scorer(
        teacher, image, meta, *objects(info, meta, image), options.topk
    )
    found = integrated_gradients(
        score, image, baseline, options.steps, options.batch
    )
    heat = found.abs().sum(0)[:height, :width].cpu().numpy()
    return reduced(heat, (info['height'], info['width']), options.size)


def objects(
    info: Mapping[str, Any], meta: Any, image: Tensor
) -> tuple[Tensor, Tensor]:
    """Boxes, moved as the image was, (G, 4), and their classes, (G,).

    Not those that the pipeline of tests gives: it loads annotations behind
    what resizes, as the metric wants them.
    """
    known = [one for one in info['instances'] if not one['ignore_flag']]
    boxes = image.new_tensor([list(one['bbox']) for one in known])
    labels = [one['bbox_label'] for one in known]
    scale = image.new_tensor([*meta.scale_factor[:2]] * 2)
    return (
        boxes.reshape(-1, 4) * scale,
        torch.tensor(labels, dtype=torch.long, device=image.device),
    )


def scorer(
    teacher: Teacher,
    image: Tensor,
    meta: Any,
    boxes: Tensor,
    labels: Tensor,
    topk: int = 10,
) -> Callable[[Tensor], Tensor]:
    """The number that is explained: a sum of the teacher's probabilities.

    For each object that of its class at the prediction that fits it best: the
    product of the probability and the overlap is largest. Without objects, the
    ``topk`` largest of all. Which predictions these are is decided on the
    image itself, so that what is followed from the baseline on is one smooth
    function. What else a head multiplies its scores by (centerness,
    objectness) is left out.

    Args:
        teacher: Loaded, its head among its taps.
        image: As the teacher wants it, (3, H, W).
        meta: mmdet's sample of the image, without annotations.
        boxes: Of the objects, in pixels of ``image``, (G, 4).
        labels: Their classes, (G,).
        topk: Scores that count where G is 0.

    Returns:
        (M, 3, H, W) → (M,).
    """
    with torch.no_grad():
        probs, corners = look(teacher, image[None], meta)
    probs, corners = probs[0], corners[0]
    if len(boxes):
        fit = bbox_overlaps(boxes, corners) * probs[:, labels].T  # G, P
        best, places = fit.max(1)
        classes, counts = labels, (best > 0).to(probs)
    else:
        best, order = probs.flatten().topk(min(topk, probs.numel()))
        places = order // probs.shape[1]
        classes, counts = order % probs.shape[1], torch.ones_like(best)

    def score(images: Tensor) -> Tensor:
        probs, _ = look(teacher, images, meta, images.requires_grad)
        return (probs[:, places, classes] * counts).sum(1)

    return score


def look(
    teacher: Teacher, images: Tensor, meta: Any, grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Probabilities and boxes of all anchors.

    Args:
        teacher: With its head among its taps.
        images: Views of one image, as the teacher wants them, (M, 3, H, W).
        meta: mmdet's sample of the image, without annotations.
        grad: Keep the graph from the images to the probabilities.

    Returns:
        (M, P, K) and (M, P, 4).
    """
    number = len(images)
    record = teacher.run(images, [meta] * number, teacher.pixels, [HEAD], grad)
    gt = GroundTruth.from_boxes(
        [images.new_zeros(0, 4)] * number, tuple(images.shape[-2:])
    )
    found = seen(record, gt, HEAD)
    head = getattr(record.detector, HEAD)
    logits = found.logits()
    if getattr(head, 'use_sigmoid_cls', True):
        return logits.sigmoid(), found.corners
    return logits.softmax(2)[..., :-1], found.corners  # less the background


def reduced(
    heat: np.ndarray, stored: tuple[int, int], size: int
) -> np.ndarray:
    """A map of the proportions of its image, its largest value 1.

    Args:
        heat: What each pixel adds, as the teacher saw the image, (H, W).
        stored: Height and width of the image as stored.
        size: Longest side wanted; the image's own where that is shorter.
    """
    share = min(1.0, size / max(stored))
    height, width = (max(1, round(share * side)) for side in stored)
    heat = cv2.resize(heat, (width, height), interpolation=cv2.INTER_AREA)
    return heat / max(heat.max(), np.finfo(heat.dtype).tiny)
