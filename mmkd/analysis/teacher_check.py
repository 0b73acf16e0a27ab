"""Is a teacher what its file says, and does it detect what it should?

Its tensors are compared with those of the file by hash, and it is evaluated
on some images of the student's data, in its own pre-processing. What it finds
is believed as far as so few images allow.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.evaluation import bbox_overlaps
from mmdet.models import DetDataPreprocessor
from mmdet.structures.bbox import get_box_tensor
from mmengine.dataset import pseudo_collate
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mmkd.analysis.average_precision import (
    ImageMatches,
    bootstrap,
    draw_counts,
)
from mmkd.analysis.statistics import percentile_interval
from mmkd.classes import by_name
from mmkd.compat.checkpoint import (
    TERM_PREFIX,
    read_checkpoint,
    state_dict_of,
)
from mmkd.pixels import Pixels
from mmkd.randomness import preserved
from mmkd.teachers import Teacher

#: Share of resampled image sets inside of an interval.
LEVEL = 0.99
#: A teacher that cannot have this AP, in percent, teaches next to nothing.
LEAST = 5.0
#: Gain in AP, in percent, from which another way to see images is named.
GAIN = 5.0
#: Objects that must have been found to say how a teacher calls them.
FOUND = 10
#: Where the zoos' AP is from.
COCO_VAL = 'instances_val2017.json'
#: How images were normalised for the weights that most zoos hold.
USUAL = {
    "ImageNet's mean and deviation, RGB": Pixels(
        (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), True, 0.0, 1
    ),
    "Caffe's mean, BGR": Pixels(
        (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False, 0.0, 1
    ),
}


# ------------------------------------------------------------------- its file


@dataclass(frozen=True)
class Comparison:
    """A teacher's tensors beside those of its file.

    Attributes:
        same: How many are equal, bit for bit.
        cut: How many were compared as a second loading cuts or renames them.
        differs: Names of those that are not equal.
        strange: Names of those of the teacher that the file does not hold.
        infinite: Names of those with values that are not finite.
        digest: SHA-256 of all tensors of the teacher.
    """

    same: int
    cut: int
    differs: tuple[str, ...]
    strange: tuple[str, ...]
    infinite: tuple[str, ...]
    digest: str


def compare_with_file(teacher: Teacher, again: Mapping) -> Comparison:
    """Compare a teacher with its file, tensor by tensor, by hash.

    Args:
        teacher: Loaded.
        again: Its settings in the config, for a second one beside it where
            loading renames tensors or cuts them to classes.
    """
    own = teacher.detector.state_dict()
    hashes = {key: tensor_digest(value) for key, value in own.items()}
    held = set(hashes.values())
    state = state_dict_of(
        read_checkpoint(teacher.checkpoint), prefer_ema=teacher.ema
    )
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(TERM_PREFIX)
    }
    differs, unknown, same = [], [], 0
    for key, value in state.items():
        if key not in own:
            # Renamed while it was loaded, or there for the second time.
            if tensor_digest(value) not in held:
                unknown.append(key)
            continue
        if value.shape != own[key].shape:
            unknown.append(key)
        elif tensor_digest(value.to(own[key].dtype)) == hashes[key]:
            same += 1
        else:
            differs.append(key)
    strange = [key for key in own if key not in state]
    cut = 0
    if teacher.names is not None or unknown or strange:
        other = _second(teacher, again).detector.state_dict()
        differs = [
            key for key in own if tensor_digest(other[key]) != hashes[key]
        ]
        cut, strange = max(0, len(own) - len(differs) - same), []
    every = hashlib.sha256(''.join(hashes.values()).encode()).hexdigest()
    return Comparison(
        same=same,
        cut=cut,
        differs=tuple(differs),
        strange=tuple(strange),
        infinite=tuple(
            key
            for key, value in own.items()
            if value.is_floating_point() and not value.isfinite().all()
        ),
        digest=every,
    )


def _second(teacher: Teacher, settings: Mapping) -> Teacher:
    plain = {
        key: one
        for key, one in settings.items()
        if key not in ('cache', 'fast', 'inherit', 'sham')
    }
    with preserved():
        other = Teacher(**plain, name=teacher.name)
        other.load()
    return other


def tensor_digest(value: Tensor) -> str:
    """SHA-256 of a tensor: its type, shape and bytes.

    Example:
        >>> one = torch.zeros(2)
        >>> tensor_digest(one) == tensor_digest(torch.zeros(2, 1))
        False
    """
    digest = hashlib.sha256(f'{value.dtype} {tuple(value.shape)}'.encode())
    value = value.detach().cpu().contiguous().flatten()
    digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()


# -------------------------------------------------------------- what it finds


@dataclass
class Seen:
    """Images with their objects, and what a teacher finds in them.

    Attributes:
        sizes: Height and width of each image, pixels.
        boxes: Of the objects of each image, corners, (M, 4).
        labels: Their classes, (M,).
        ignored: Whether an object does not count, (M,).
        data: What a pipeline made of each image.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    boxes: list[NDArray] = field(default_factory=list)
    labels: list[NDArray] = field(default_factory=list)
    ignored: list[NDArray] = field(default_factory=list)
    data: list[dict] = field(default_factory=list)

    @property
    def objects(self) -> int:
        return sum(int((~one).sum()) for one in self.ignored)


@dataclass(frozen=True)
class Verdict:
    """AP of a teacher on some images.

    Attributes:
        ap: In percent; NaN without an object.
        high: What it may be at most, in percent, with so few images.
        low: What it is at least.
        images, objects: What it rests on.
        matches: For comparisons with another evaluation of the same images.
    """

    ap: float
    low: float
    high: float
    images: int
    objects: int
    matches: ImageMatches = field(repr=False)


def look_at(dataset: Any, images: int) -> Seen:
    """Some images of a data set, evenly spread over it.

    Args:
        dataset: Built, with a pipeline of tests.
        images: How many; all if there are fewer.
    """
    seen = Seen()
    count = min(images, len(dataset))
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int):
        info, data = dataset.get_data_info(int(index)), dataset[int(index)]
        if data is None:
            continue
        objects = info.get('instances', [])
        seen.sizes.append((info['height'], info['width']))
        seen.boxes.append(
            np.array([one['bbox'] for one in objects], float).reshape(-1, 4)
        )
        seen.labels.append(
            np.array([one['bbox_label'] for one in objects], int)
        )
        seen.ignored.append(
            np.array([one.get('ignore_flag', 0) for one in objects], bool)
        )
        seen.data.append(data)
    return seen


def detect(teacher: Teacher, seen: Seen, device: str = 'cpu') -> list[dict]:
    """What a teacher finds, in pixels of the images as they are stored.

    Returns:
        Of each image ``boxes`` (K, 4), ``scores`` and ``labels``, the
        teacher's own.
    """
    teacher.to(torch.device(device))
    found = []
    with preserved(), torch.no_grad():
        for data in seen.data:
            (sample,) = teacher.detector.test_step(pseudo_collate([data]))
            result = sample.pred_instances.cpu()
            found.append(
                dict(
                    boxes=get_box_tensor(result.bboxes).double().numpy(),
                    scores=result.scores.double().numpy(),
                    labels=result.labels.numpy(),
                )
            )
    return found


def evaluate(
    seen: Seen,
    found: Sequence[Mapping[str, NDArray]],
    classes: Sequence[str],
    names: Sequence[int | None],
    draws: int = 500,
) -> Verdict:
    """COCO's AP of boxes, and how far so few images leave it open.

    The interval is that of resampled images. Where nothing at all is found of
    K objects, AP may still be as high as a part of which one is missed K times
    with a probability of 1 %: 1 - 0.01^(1/K).

    Args:
        seen: The images.
        found: Of each image, see :func:`detect`.
        classes: Of the data.
        names: The data's class of each of the teacher's, None for one that it
            has not.
        draws: Sets of images that are drawn.
    """
    truth = dict(
        images=[
            dict(id=one, height=size[0], width=size[1])
            for one, size in enumerate(seen.sizes)
        ],
        categories=[
            dict(id=one, name=name) for one, name in enumerate(classes)
        ],
        annotations=[],
    )
    results = []
    for image, said in enumerate(found):
        for box, label, crowd in zip(
            seen.boxes[image], seen.labels[image], seen.ignored[image]
        ):
            x, y, width, height = _extent(box)
            truth['annotations'].append(
                dict(
                    id=len(truth['annotations']) + 1,
                    image_id=image,
                    category_id=int(label),
                    bbox=[x, y, width, height],
                    area=width * height,
                    iscrowd=int(crowd),
                )
            )
        for box, label, score in zip(
            said['boxes'], said['labels'], said['scores']
        ):
            label = names[label] if label < len(names) else None
            if label is not None:
                results.append(
                    dict(
                        image_id=image,
                        category_id=int(label),
                        bbox=_extent(box),
                        score=float(score),
                    )
                )
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, 'truth.json'), Path(folder, 'found.json')
        for path, content in zip(paths, (truth, results)):
            path.write_text(json.dumps(content))
        matches = ImageMatches.from_files(*paths)
    ap = 100 * matches.ap()
    if ap < 0:
        ap = math.nan
    counts, _ = draw_counts(len(seen.sizes), 1, draws, images_only=True)
    interval = percentile_interval(
        ap, 100 * matches.ap_of_draws(counts), LEVEL
    )
    objects = seen.objects
    unseen = 100 * (1 - (1 - LEVEL) ** (1 / objects)) if objects else 100.0
    return Verdict(
        ap=ap,
        low=interval.low,
        high=max(interval.high, unseen),
        images=len(seen.sizes),
        objects=objects,
        matches=matches,
    )


def _extent(box: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = (float(one) for one in box)
    return [x1, y1, x2 - x1, y2 - y1]


def better(other: Verdict, own: Verdict) -> bool:
    """Whether another evaluation of the same images is better for certain."""
    if not other.ap - own.ap >= GAIN:
        return False
    gain = bootstrap(
        [other.matches], [own.matches], 500, level=LEVEL, images_only=True
    )
    return gain.low > 0


# -------------------------------------------------------------------- classes


def label_names(
    teacher: Teacher, classes: Sequence[str]
) -> list[int | None] | None:
    """The data's class of each of the teacher's.

    By name where both are known, else by place.

    Args:
        teacher: Loaded.
        classes: Of the data.

    Returns:
        None where no class is shared.
    """
    count = len(classes)
    if teacher.names is not None:
        kept = teacher.shared
        return list(range(count)) if kept is None else list(kept)
    if teacher.classes is None:
        return list(range(count))
    places = {name: place for place, name in enumerate(classes)}
    names = [places.get(name) for name in teacher.classes]
    return None if all(one is None for one in names) else names


def confused(
    seen: Seen,
    found: Sequence[Mapping[str, NDArray]],
    names: Sequence[int | None],
    count: int,
) -> list[int | None] | None:
    """How a teacher calls the classes, if otherwise than it should.

    Each object is called as the surest detection that overlaps with it by
    half.

    Args:
        seen: The images.
        found: Of each image, see :func:`detect`.
        names: The data's class of each of the teacher's.
        count: Classes of the data.

    Returns:
        The data's class of each of the teacher's as objects show it; None if
        it calls them as it should, or too few were found to say.
    """
    votes = np.zeros((count, len(names)), int)
    for boxes, labels, ignored, said in zip(
        seen.boxes, seen.labels, seen.ignored, found
    ):
        if not len(said['boxes']):
            continue
        overlap = bbox_overlaps(
            boxes.astype(np.float32), said['boxes'].astype(np.float32)
        )
        sure = np.where(overlap >= 0.5, said['scores'], -1)
        for row, label, out in zip(sure, labels, ignored):
            best = int(row.argmax())
            if row[best] > 0 and not out and said['labels'][best] < len(names):
                votes[label, said['labels'][best]] += 1
    total = votes.sum()
    right = sum(
        votes[own, theirs]
        for theirs, own in enumerate(names)
        if own is not None
    )
    own, theirs = linear_sum_assignment(-votes)
    assigned = votes[own, theirs].sum()
    # Random names agree by chance; a permutation explains nearly all.
    if total < FOUND or right >= 0.5 * total or assigned < 0.8 * total:
        return None
    pairs = {
        int(place): int(label)
        for label, place in zip(own, theirs)
        if votes[label, place]
    }
    return [pairs.get(place) for place in range(len(names))]


def permuted(teacher: Teacher, classes: Sequence[str]) -> bool:
    """Whether a teacher has the data's classes, in another order."""
    theirs = teacher.classes
    return (
        teacher.names is None
        and theirs is not None
        and tuple(theirs) != tuple(classes)
        and any(by_name(classes, theirs))
    )


# --------------------------------------------------------------------- pixels


@contextmanager
def seeing(detector: nn.Module, pixels: Pixels) -> Iterator[bool]:
    """Let a detector normalise its images otherwise.

    Returns:
        Whether it can: its preprocessor is mmdet's own.
    """
    own = detector.data_preprocessor
    if type(own) is not DetDataPreprocessor:
        yield False
        return
    other = DetDataPreprocessor(
        mean=list(pixels.mean),
        std=list(pixels.std),
        bgr_to_rgb=pixels.swapped,
        pad_size_divisor=own.pad_size_divisor,
        pad_value=own.pad_value,
    )
    detector.data_preprocessor = other.to(own.device)
    try:
        yield True
    finally:
        detector.data_preprocessor = own


def other_pixels(own: Pixels, student: Pixels) -> dict[str, Pixels]:
    """Other ways to normalise, which a teacher may have been trained with.

    Those that differ from its own and from each other.
    """
    turned = Pixels(
        own.mean[::-1],
        own.std[::-1],
        not own.swapped,
        own.pad_value,
        own.divisor,
    )
    ways = {
        "the student's": student,
        'its own, channels the other way round': turned,
        **USUAL,
    }
    found: dict[str, Pixels] = {}
    known = {_normalising(own)}
    for name, one in ways.items():
        if _normalising(one) not in known:
            known.add(_normalising(one))
            found[name] = one
    return found


def _normalising(pixels: Pixels) -> tuple:
    return pixels.mean, pixels.std, pixels.swapped


def told(pixels: Pixels) -> str:
    """As a preprocessor's settings are typed."""
    mean, std = (
        '[' + ','.join(f'{one:g}' for one in each) + ']'
        for each in (pixels.mean, pixels.std)
    )
    return f'mean={mean} std={std} bgr_to_rgb={pixels.swapped}'


# ----------------------------------------------------------------------- cards

_SUMMARY = re.compile(
    r'[^:]+: .+ \(\d+\.\d AP alone\) learns from .+? '
    r'\((\d+\.\d(?:, \d+\.\d)*) AP\)\.'
)


def published_ap(path: str | Path | None, teachers: Sequence[str]) -> dict:
    """AP that a config's card states for its teachers, by their names.

    Args:
        path: The config.
        teachers: Their names, in the config's order.

    Returns:
        In percent, on COCO's val2017; nothing where there is no card.
    """
    path = Path(path) if path else None
    if path is None or path.suffix != '.py' or not path.is_file():
        return {}
    text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    said = _SUMMARY.match(' '.join(text.split('\n\n')[0].split()))
    values = [float(one) for one in said[1].split(', ')] if said else []
    if len(values) != len(teachers):
        return {}
    return dict(zip(teachers, values))
