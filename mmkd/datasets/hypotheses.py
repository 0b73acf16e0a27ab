"""Multi-hypothesis distillation: several answers of a teacher as labels.

A teacher describes each image several times, the descriptions are kept in one
file, and a detector is trained on them by its own losses. Nothing of the
teacher is in memory then, and the two may be detectors of any kind.

Reference:
    Galiano-Jimenez et al., "Multi-Hypothesis Distillation", 2025,
    arXiv:2507.21568, for translation, where a hypothesis is a sentence. Here
    it is the set of all boxes of an image; the generators for boxes are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmdet.evaluation.functional import bbox_overlaps
from mmengine.dataset import force_full_init

from mmkd.checks import check_name
from mmkd.files import whole
from mmkd.reading import read_json
from mmkd.registry import DATASETS

#: How several hypotheses are made from a teacher.
GENERATORS = ('nbest', 'sample', 'mc_dropout', 'checkpoints', 'mbr')
#: Those that draw from what the teacher finds once.
DRAWN = ('sample', 'mbr')
#: Hypotheses of an image that a file may have.
MOST = 1000
#: What to do about a file that is none of hypotheses.
REMEDY = 'Make it anew: python tools/make_hypotheses.py --help'


class Boxes(NamedTuple):
    """One set of boxes.

    Attributes:
        boxes: x1 y1 x2 y2 in pixels of the image as stored, (N, 4).
        scores: In [0, 1], (N,).
        labels: Numbers of classes, (N,).
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def at(self, index: np.ndarray) -> Boxes:
        """Those of an index or a mask."""
        return Boxes(*(one[index] for one in self))


def nbest(found: Boxes, number: int, score_thr: float) -> list[Boxes]:
    """Sets of ever fewer boxes: the first is plain pseudo-labelling.

    The thresholds divide the way from ``score_thr`` to 1 evenly.

    Args:
        found: What the teacher finds.
        number: Hypotheses wanted.
        score_thr: The lowest threshold; boxes of its score are kept.
    """
    steps = score_thr + (1 - score_thr) * np.arange(number) / number
    return [found.at(found.scores >= step) for step in steps]


def candidates(
    found: Boxes, classes: int, iou_thr: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes on the same object, joined to one with a score for each class.

    Args:
        found: What the teacher finds, of all classes.
        classes: Their number, K.
        iou_thr: Overlap with the best box from which on two are one object.

    Returns:
        Boxes of every candidate and class, (N, K, 4), that of the best class
        where a class has none, and their scores, (N, K).
    """
    places, scores = _members(found, classes, iou_thr)
    return found.boxes[places], scores


def _members(
    found: Boxes, classes: int, iou_thr: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Likewise, with the places of the boxes, (N, K)."""
    order = np.argsort(-found.scores, kind='stable')
    order = order[found.scores[order] > 0]
    found = found.at(order)
    near = bbox_overlaps(found.boxes, found.boxes) >= iou_thr
    free = np.ones(len(order), bool)
    places, scores = [], []
    for index in range(len(order)):
        if not free[index]:
            continue
        near[index, index] = True  # also a box without an area
        members = np.flatnonzero(near[index] & free)
        free[members] = False
        score = np.zeros(classes)
        place = np.full(classes, order[index])
        for member in members[::-1]:  # the best of a class is the last
            score[found.labels[member]] = found.scores[member]
            place[found.labels[member]] = order[member]
        places.append(place)
        scores.append(score)
    if not places:
        return np.zeros((0, classes), int), np.zeros((0, classes))
    return np.stack(places), np.stack(scores)


def sample(
    found: Boxes,
    number: int,
    classes: int,
    random: np.random.Generator,
    temperature: float = 1.0,
    jitter: float = 0.0,
    boxes: np.ndarray | None = None,
) -> list[Boxes]:
    """Sets drawn from the teacher's probabilities.

    Each candidate is there with the probability of its best score, and is of
    a class with the probability of that class among its scores. The
    temperature divides the logit of the first and the logarithms of the
    second: towards 0 the sets coincide.

    Args:
        found: What the teacher finds, of all classes.
        number: Hypotheses wanted.
        classes: Number of classes.
        random: Source of the draws.
        temperature: Above 0; 1 draws from the teacher's own probabilities.
        jitter: Deviation of each coordinate, of the box's sides.
        boxes: Those of each hypothesis, (number, N, 4); of what is found if
            None.
    """
    places, scores = _members(found, classes)
    if boxes is None:
        boxes = np.broadcast_to(found.boxes, (number, *found.boxes.shape))
    best = scores.max(1, initial=0).clip(1e-6, 1 - 1e-6)
    logit = np.log(best / (1 - best)) / temperature
    present = 1 / (1 + np.exp(-logit.clip(-500, 500)))
    with np.errstate(divide='ignore'):
        logs = np.log(scores) / temperature
    logs -= logs.max(1, keepdims=True, initial=-np.inf)
    shares = np.exp(logs)
    shares /= shares.sum(1, keepdims=True)
    sums = shares.cumsum(1)
    sets = []
    for drawn_boxes in boxes:
        here = random.random(len(best)) < present
        drawn = (random.random((len(best), 1)) >= sums).sum(1)
        drawn = drawn.clip(max=classes - 1)
        noise = random.standard_normal((len(best), 4))
        rows = np.arange(len(best))
        box = drawn_boxes[places[rows, drawn]]
        sides = np.tile(box[:, 2:] - box[:, :2], 2)
        box = box + jitter * sides * noise
        one = Boxes(box, scores[rows, drawn], drawn)
        whole = (box[:, 2:] > box[:, :2]).all(1)
        sets.append(one.at(here & whole))
    return sets


def agreement(one: Boxes, other: Boxes, iou_thr: float = 0.5) -> float:
    """F1 of two sets: boxes of one class that overlap are the same.

    Two empty sets agree. Pairs are taken in the order of their overlap.
    """
    total = len(one.labels) + len(other.labels)
    if not total:
        return 1.0
    iou = bbox_overlaps(one.boxes, other.boxes)
    iou = iou * (one.labels[:, None] == other.labels[None])
    pairs = 0
    while iou.size and iou.max() >= iou_thr:
        row, column = np.unravel_index(iou.argmax(), iou.shape)
        iou[row], iou[:, column] = 0, 0
        pairs += 1
    return 2 * pairs / total


def mbr(pool: Sequence[Boxes], number: int) -> list[Boxes]:
    """Those of a pool that agree best with its others, the best first."""
    mean = [
        sum(
            agreement(one, other)
            for place, other in enumerate(pool)
            if place != index
        )
        for index, one in enumerate(pool)
    ]
    order = np.argsort(-np.asarray(mean), kind='stable')
    return [pool[index] for index in order[:number]]


def generate(
    found: Boxes,
    generator: str,
    number: int,
    classes: int,
    random: np.random.Generator,
    score_thr: float = 0.3,
    temperature: float = 1.0,
    jitter: float = 0.0,
    boxes: Callable[[int], np.ndarray] | None = None,
) -> list[Boxes]:
    """Hypotheses of one image, by the name of the generator.

    ``mbr`` keeps the best of a pool four times as large. ``boxes`` draws all
    that is found so many times, where it is not to be drawn by ``jitter``
    alone.

    Raises:
        ValueError: If there is no such generator, or no hypothesis is asked.
    """
    check_name('generate', 'generator', generator, ('nbest', *DRAWN))
    if number < 1 or temperature <= 0:
        raise ValueError(
            f'generate needs at least one hypothesis and a temperature '
            f'above 0, got {number} and {temperature}. The paper takes '
            f'--num-hypotheses 10 --temperature 1.'
        )
    if generator == 'nbest':
        return nbest(found, number, score_thr)
    pool = number if generator == 'sample' else 4 * number
    drawn = None if boxes is None else boxes(pool)
    sets = sample(found, pool, classes, random, temperature, jitter, drawn)
    return sets if generator == 'sample' else mbr(sets, number)


# ------------------------------------------------------------------- the file


def write_cache(path: str | Path, cache: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text(json.dumps(cache))


def annotations(
    image_id: int, sets: Sequence[Boxes], start: int, ids: Sequence[int]
) -> list[dict]:
    """Hypotheses of an image as annotations of COCO, with ``hyp_id``.

    Args:
        image_id: Of the image.
        sets: Its hypotheses.
        start: Id of the first annotation.
        ids: Category of each class.
    """
    found = []
    for number, one in enumerate(sets):
        for box, score, label in zip(*one):
            x1, y1, x2, y2 = (round(float(value), 2) for value in box)
            found.append(
                dict(
                    id=start + len(found),
                    image_id=image_id,
                    hyp_id=number,
                    bbox=[x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    area=round((x2 - x1) * (y2 - y1), 2),
                    category_id=ids[int(label)],
                    score=round(float(score), 5),
                    iscrowd=0,
                )
            )
    return found


def _corners(box: Any) -> list[float]:
    """A box of a file, which may have been written by anyone.

    Raises:
        TypeError: If it is none.
    """
    if not isinstance(box, list) or not (
        len(box) == 4 and all(isinstance(one, (int, float)) for one in box)
    ):
        raise TypeError(f'bbox={box!r:.40} is no box')
    x, y, width, height = box
    return [x, y, x + width, y + height]


@DATASETS.register_module()
class HypothesisDataset:
    """A data set whose annotations are a teacher's hypotheses.

    They stand in for the annotations before the pipeline, which then moves
    them as it moves any box. The set's own annotations are neither read nor
    used to leave images out, unless ``gt_weight`` asks for them.

    The losses of a detector are not touched: the mean over hypotheses is one
    over visits. Likewise ``gt_weight`` is the share of visits that show the
    annotations, ``gt_weight / (1 + gt_weight)``, which is the sum of both
    losses in expectation, divided by ``1 + gt_weight``.

    Args:
        dataset: Config of a COCO-style set of mmdet.
        cache_file: As ``tools/make_hypotheses.py`` writes it.
        gt_weight: Weight of the annotations, beside 1 for the hypotheses.
        copies: Show every hypothesis of an image once an epoch, which is
            that many times as long; otherwise each visit draws one.
        num_hypotheses: How many of the file's count, the first; all if None.
        refresh_epochs: Take the next so many of the file after so many
            passes over the data, and the first again after the last; the
            same all the time if None. The file has then several times
            ``num_hypotheses``. It is mmkd's own trainer that tells the epoch.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its classes are not those of the set, an image is not
            in it, it is not complete, it holds too few hypotheses or
            ``gt_weight`` is negative.

    Reference:
        Galiano-Jimenez et al., "Multi-Hypothesis Distillation", 2025,
        arXiv:2507.21568, for translation. Hypotheses for images, their
        generators and ``refresh_epochs`` are ours.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        cache_file: str | Path,
        gt_weight: float = 0.0,
        copies: bool = False,
        num_hypotheses: int | None = None,
        refresh_epochs: int | None = None,
    ) -> None:
        if gt_weight < 0:
            raise ValueError(
                f'HypothesisDataset needs gt_weight of 0 or more, got '
                f'{gt_weight}. Set gt_weight=0 for hypotheses alone.'
            )
        if not Path(cache_file).is_file():
            raise FileNotFoundError(
                f'HypothesisDataset found no file {str(cache_file)!r}. Type '
                f'python tools/make_hypotheses.py CONFIG CHECKPOINT --out '
                f'{cache_file}'
            )
        self.gt_weight, self.copies = gt_weight, copies
        dataset = dict(dataset)
        dataset['filter_cfg'] = None  # it would look at the annotations
        self.dataset = DATASETS.build(dataset)
        self._metainfo = self.dataset.metainfo
        self.epoch = 0
        self._read(cache_file)
        self.count = num_hypotheses or self.number
        self.refresh_epochs = refresh_epochs
        self._check_count(cache_file)
        self.full_init()

    @property
    def metainfo(self) -> dict:
        return dict(self._metainfo)

    def _read(self, file: str | Path) -> None:
        cache = read_json(
            file, 'HypothesisDataset', 'hypotheses', REMEDY, kind=dict
        )
        try:
            self._take(cache, file)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f'HypothesisDataset expected hypotheses in {str(file)!r}, got '
                f'JSON of another kind ({type(error).__name__}: {error}). '
                f'{REMEDY}'
            ) from error

    def _take(self, cache: Mapping[str, Any], file: str | Path) -> None:
        theirs = tuple(one['name'] for one in cache['categories'])
        ours = tuple(self.metainfo['classes'])
        if theirs != ours:
            raise ValueError(
                f'HypothesisDataset needs hypotheses of its own classes '
                f'{ours}, got {theirs} in {file}. Name a teacher of these '
                f'classes to tools/make_hypotheses.py.'
            )
        if not cache['info']['complete']:
            raise ValueError(
                f'HypothesisDataset needs a whole file, got {file}, which '
                f'was interrupted. Repeat its command: it goes on.'
            )
        self.number = cache['info']['num_hypotheses']
        if not 0 < self.number <= MOST:
            raise ValueError(
                f'HypothesisDataset needs 1 to {MOST} hypotheses an image, '
                f'got {self.number} in {file}. {REMEDY}'
            )
        self.sets = {
            one['id']: [[] for _ in range(self.number)]
            for one in cache['images']
        }
        places = {
            one['id']: place for place, one in enumerate(cache['categories'])
        }
        for one in cache['annotations']:
            self.sets[one['image_id']][one['hyp_id']].append(
                dict(
                    bbox=_corners(one['bbox']),
                    bbox_label=places[one['category_id']],
                    ignore_flag=0,
                )
            )

    def _check_count(self, file: str | Path) -> None:
        groups = 1 if self.refresh_epochs is None else 2
        if not 0 < self.count <= self.number // groups:
            raise ValueError(
                f'HypothesisDataset needs {groups} times '
                f'num_hypotheses={self.count} or more, got {self.number} of '
                f'each image in {file}. Make more of them with '
                f'--num-hypotheses, or set a smaller num_hypotheses.'
            )
        if self.refresh_epochs is not None and self.refresh_epochs < 1:
            raise ValueError(
                f'HypothesisDataset needs refresh_epochs of 1 or more, got '
                f'{self.refresh_epochs}. Leave it out to keep all hypotheses '
                f'all the time.'
            )

    def set_epoch(self, epoch: int) -> None:
        """Say how often all of the data was drawn before."""
        self.epoch = epoch

    @property
    def first(self) -> int:
        """Number of the first hypothesis that counts now."""
        if self.refresh_epochs is None:
            return 0
        group = self.epoch // self.refresh_epochs
        return group % (self.number // self.count) * self.count

    def full_init(self) -> None:
        self.dataset.full_init()
        self._fully_initialized = True
        for index in range(len(self.dataset)):
            known = self.dataset.get_data_info(index)['img_id']
            if known not in self.sets:
                raise ValueError(
                    f'HypothesisDataset found no hypothesis of image '
                    f'{known}. Make the file from the set that is trained '
                    f'on: python tools/make_hypotheses.py --help'
                )

    @force_full_init
    def __len__(self) -> int:
        return len(self.dataset) * (self.count if self.copies else 1)

    @force_full_init
    def get_data_info(self, index: int) -> dict:
        """Of an image, its annotations one hypothesis of the teacher."""
        number = index % self.count if self.copies else None
        place = index // self.count if self.copies else index
        info = self.dataset.get_data_info(place)
        if self.gt_weight and np.random.rand() < self.gt_weight / (
            1 + self.gt_weight
        ):
            return info
        if number is None:
            number = np.random.randint(self.count)
        sets = self.sets[info['img_id']][self.first + number]
        info['instances'] = [dict(one) for one in sets]
        return info

    def __getitem__(self, index: int) -> Any:
        for _ in range(1000):
            data = self.dataset.pipeline(self.get_data_info(index))
            if data is not None:  # an augmentation may refuse an image
                return data
            index = np.random.randint(len(self))
        raise ValueError(
            'HypothesisDataset got nothing from its pipeline for 1000 '
            'images. Take out the transforms that refuse images.'
        )
