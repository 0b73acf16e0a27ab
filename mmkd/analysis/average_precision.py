"""COCO AP in which images count as often as asked, for the bootstrap.

pycocotools matches detections with objects image by image; how images are put
together is sorting and sums. The matches are therefore found once and kept,
and AP of a resampled test set costs milliseconds.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmkd.analysis.statistics import Interval, percentile_interval
from mmkd.checks import check_name
from mmkd.reading import read_json

__all__ = ['ImageMatches', 'bootstrap', 'draw_counts', 'resample']

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = ('all', 'small', 'medium', 'large')

#: Weights in work at a time, so that they stay in the cache.
BLOCK = 2**18


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """Detections of one run, matched with the objects of each image.

    Detections stand in pycocotools' order: by class, image and falling score,
    at most 100 of a class and image. D is their number, T the ten IoUs from
    0.5 to 0.95, A the areas all, small, medium, large.

    Args:
        image_ids: Ids in the annotation file, ascending, (I,).
        classes: Names, in the order of their ids, (C,).
        scores: (D,).
        image: Index into ``image_ids``, (D,).
        label: Index into ``classes``, (D,).
        matched: Whether an object was found, (A, T, D).
        ignored: Whether the detection does not count, for what it found is a
            crowd or outside the area, or it is itself, (A, T, D).
        objects: Number of objects that count, (A, I, C).
    """

    image_ids: tuple
    classes: tuple[str, ...]
    scores: NDArray[np.float64]
    image: NDArray[np.intp]
    label: NDArray[np.intp]
    matched: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    objects: NDArray[np.intp]
    _drawn: dict = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_files(
        cls, ann_file: str | Path, results_json: str | Path
    ) -> ImageMatches:
        """Match a run's boxes by pycocotools.

        Args:
            ann_file: Annotations in COCO format.
            results_json: Detections as COCO has them submitted: the
                ``*.bbox.json`` of mmdet's ``CocoMetric``. The list may be
                empty.
        """
        with redirect_stdout(io.StringIO()):  # pycocotools chats
            truth = COCO(str(ann_file))
            evaluation = COCOeval(truth, _results(truth, results_json), 'bbox')
            evaluation.evaluate()
        params = evaluation.params
        shape = len(params.catIds), len(AREAS), len(params.imgIds)
        scores, image, label, matched, ignored = [], [], [], [], []
        objects = np.zeros((shape[1], shape[2], shape[0]), np.intp)
        for place, found in enumerate(evaluation.evalImgs):
            if found is None:
                continue
            c, a, i = np.unravel_index(place, shape)
            objects[a, i, c] = np.count_nonzero(found['gtIgnore'] == 0)
            matched.append((a, found['dtMatches'] != 0))
            ignored.append((a, found['dtIgnore']))
            if a == 0:  # the same detections in every area
                scores += found['dtScores']
                image += [i] * len(found['dtScores'])
                label += [c] * len(found['dtScores'])
        names = [one['name'] for one in truth.loadCats(params.catIds)]
        return cls(
            image_ids=tuple(one.item() for one in np.asarray(params.imgIds)),
            classes=tuple(names),
            scores=np.array(scores, float),
            image=np.array(image, np.intp),
            label=np.array(label, np.intp),
            matched=_by_area(matched),
            ignored=_by_area(ignored),
            objects=objects,
        )

    def ap(
        self,
        weights: ArrayLike | None = None,
        iou: float | None = None,
        area: str = 'all',
        by_class: bool = False,
    ) -> float | dict[str, float]:
        """AP as pycocotools defines it, of images that count several times.

        With weights it is the AP of a set in which every image is repeated so
        often, its copies standing one after another.

        Args:
            weights: How often each image counts, whole numbers, (I,). Once
                each if not given.
            iou: One of 0.5, 0.55, …, 0.95; the mean over all if not given.
            area: ``'all'``, ``'small'``, ``'medium'`` or ``'large'``.
            by_class: Give each class by its name instead of the mean.

        Returns:
            AP in [0, 1], or −1 without any object that counts.
        """
        weights = self._checked(
            np.ones(len(self.image_ids)) if weights is None else weights
        )
        values = self._class_ap(weights[None], iou, area)[0]
        if by_class:
            values = np.where(np.isnan(values), -1, values)
            return dict(zip(self.classes, values.tolist()))
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else -1.0

    def ap_of_draws(self, weights: ArrayLike) -> NDArray[np.float64]:
        """AP of objects of any size, over all IoUs, for many sets of weights.

        Args:
            weights: How often each image counts in each draw, (B, I).

        Returns:
            AP in [0, 1], (B,); NaN in a draw without any object.
        """
        values = self._class_ap(self._checked(weights))
        known = ~np.isnan(values)
        total = np.where(known, values, 0).sum(1)
        return np.divide(
            total,
            known.sum(1),
            out=np.full(len(total), math.nan),
            where=known.any(1),
        )

    def ap_of_resamples(
        self, draws: int, seed: int = 0
    ) -> NDArray[np.float64]:
        """AP in each of so many resampled test sets, as :func:`resample`
        draws them for every run alike.

        It takes seconds, and a run is compared several times, so it is kept.

        Args:
            draws: Number of draws, B.
            seed: Of the generator.

        Returns:
            AP in [0, 1], (B,); NaN in a draw without any object.
        """
        key = draws, seed
        if key not in self._drawn:
            of_images, _ = draw_counts(len(self.image_ids), 1, draws, seed)
            self._drawn[key] = self.ap_of_draws(of_images)
        return self._drawn[key]

    def per_image(self, score_thr: float = 0.3) -> NDArray[np.float64]:
        r"""How well each image is detected, to find the best and the worst.

        :math:`F_1 = TP / (TP + (FP + FN) / 2)` of the detections above a
        threshold, all classes together, averaged over the ten IoUs: 1 if every
        object is found at an IoU of 0.95 and nothing else is, 0 if none is. As
        objects are matched in the order of scores, it does not depend on what
        lies below the threshold.

        Args:
            score_thr: Detections count from this score on.

        Returns:
            In [0, 1], (I,); NaN for images with neither objects nor
            detections that count.
        """
        counts = ~self.ignored[0] & (self.scores >= score_thr)  # (T, D)
        images = len(self.image_ids)
        right, counted = (
            np.stack([np.bincount(self.image, one, images) for one in which])
            for which in (counts & self.matched[0], counts)
        )  # (T, I) each
        # TP + (FP + FN) / 2 is half of all detections and all objects.
        half = (counted + self.objects[0].sum(1)) / 2
        defined = half > 0
        score = np.divide(right, half, out=np.zeros_like(half), where=defined)
        times = defined.sum(0)
        return np.divide(
            score.sum(0), times, out=np.full(images, np.nan), where=times > 0
        )

    def _checked(self, weights: ArrayLike) -> NDArray[np.intp]:
        weights = np.asarray(weights)
        images = len(self.image_ids)
        whole = np.isfinite(weights).all() and (weights % 1 == 0).all()
        if weights.shape[-1:] != (images,) or not whole or weights.min() < 0:
            raise ValueError(
                f'ImageMatches needs weights that say how often each of '
                f'{images} images counts, whole numbers from 0, got shape '
                f'{weights.shape} with values {np.unique(weights)[:5]}.'
            )
        return weights.astype(np.intp)

    def _class_ap(
        self,
        weights: NDArray[np.intp],
        iou: float | None = None,
        area: str = 'all',
    ) -> NDArray[np.float64]:
        """AP of every class, NaN without objects, (B, I) → (B, C)."""
        check_name('ImageMatches', 'area', area, AREAS)
        where = AREAS.index(area)
        at = range(len(IOUS)) if iou is None else [_threshold(iou)]
        objects = weights @ self.objects[where]  # (B, C)
        ap = np.full(objects.shape, np.nan)
        for label in np.flatnonzero(self.objects[where].any(0)):
            ranking = self._ranking(where, label, int(weights.max()))
            step = max(1, BLOCK // max(1, len(ranking.image)))
            for start in range(0, len(weights), step):
                block = slice(start, start + step)
                ap[block, label] = ranking.ap(
                    weights[block], objects[block, label], at
                )
        ap[objects == 0] = np.nan
        return ap

    def _ranking(self, area: int, label: int, repeats: int) -> _Ranking:
        """A class's detections by falling score; ties as pycocotools has them.

        Equal scores are ranked by image, and within an image as they are. A
        repeated image repeats such a run as a whole: a b a b, not a a b b,
        which differs if a is right and b is wrong. Its copies are therefore
        ranked one by one, all others by weight.
        """
        own = np.flatnonzero(self.label == label)
        own = own[np.argsort(-self.scores[own], kind='stable')]
        counts = ~self.ignored[area][:, own]
        right = counts & self.matched[area][:, own]
        image, score = self.image[own], self.scores[own]
        starts = np.ones(len(own), bool)
        starts[1:] = (image[1:] != image[:-1]) | (score[1:] != score[:-1])
        run = np.cumsum(starts) - 1
        size = np.bincount(run)
        hits = np.bincount(run, right.any(0))
        apart = ((size > 1) & (hits > 0))[run] & (repeats > 1)
        column = np.repeat(
            np.arange(len(own)), np.where(apart, max(repeats, 1), 1)
        )
        first = np.searchsorted(column, column)
        copy = np.arange(len(column)) - first
        order = np.lexsort((column, copy, run[column]))
        column, copy = column[order], copy[order]
        return _Ranking(
            image=image[column],
            copy=np.where(apart[column], copy, -1),
            right=right[:, column],
            counts=counts[:, column],
        )


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Detections of one class in the order in which they count.

    Args:
        image: Index of the image, (D,).
        copy: Which copy of a repeated image it belongs to, −1 for all, (D,).
        right: Whether it finds an object that counts, (T, D).
        counts: Whether it is right or wrong, not ignored, (T, D).
    """

    image: NDArray[np.intp]
    copy: NDArray[np.intp]
    right: NDArray[np.bool_]
    counts: NDArray[np.bool_]

    @cached_property
    def places(self) -> list[tuple]:
        """Of each IoU: right ones, ignored ones, ignored before each right."""
        found = []
        for right, counts in zip(self.right, self.counts):
            right, ignored = np.flatnonzero(right), np.flatnonzero(~counts)
            found.append((right, ignored, np.searchsorted(ignored, right)))
        return found

    def ap(
        self,
        weights: NDArray[np.intp],
        objects: NDArray[np.intp],
        at: Sequence[int],
    ) -> NDArray[np.float64]:
        """Interpolated AP, averaged over IoUs.

        Only right detections are looked at: precision rises over the copies of
        one, and falls until the next. Its highest value from a recall on is
        therefore reached at the last copy of a right one.

        Args:
            weights: How often each image counts, (B, I).
            objects: Number of objects in each draw, (B,).
            at: Indices of the IoUs.

        Returns:
            (B,); 0 where there are no objects.
        """
        weights = weights[:, self.image]  # (B, D)
        once = self.copy >= 0
        weights[:, once] = weights[:, once] > self.copy[once]
        so_far = weights.cumsum(1)
        needed = np.maximum(_count_at_recall(objects), 1)  # (B, R)
        total = np.zeros(len(weights))
        for right, ignored, before in (self.places[one] for one in at):
            if not len(right):
                continue
            copies = weights[:, right]  # (B, P)
            true = copies.cumsum(1)
            counted = so_far[:, right]
            if len(ignored):
                left_out = weights[:, ignored].cumsum(1)
                some = before > 0
                counted[:, some] -= left_out[:, before[some] - 1]
            precision = true / (counted + np.spacing(1))
            best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            # One entry a copy: the k-th is the best precision from the recall
            # of k objects on.
            steps = np.repeat(best.ravel(), copies.ravel())
            if not len(steps):
                continue
            found = true[:, -1:]
            index = found.cumsum(0) - found + needed - 1
            reached = needed <= found
            total += np.where(
                reached, steps[np.where(reached, index, 0)], 0
            ).mean(1)
        return total / len(at)


def draw_counts(
    images: int,
    seeds: int,
    draws: int = 1000,
    seed: int = 0,
    images_only: bool = False,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """How often images and seeds are drawn, with replacement.

    Args:
        images: Number of test images, I.
        seeds: Number of seeds, S.
        draws: Number of draws, B.
        seed: Of the generator; equal seeds draw equal images, whatever the
            number of ``seeds``.
        images_only: Draw each seed once.

    Returns:
        Counts of the images, (B, I), and of the seeds, (B, S).
    """
    rng = np.random.default_rng(seed)
    of_images = rng.multinomial(images, np.full(images, 1 / images), draws)
    if images_only:
        return of_images, np.ones((draws, seeds), np.intp)
    return of_images, rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)


def resample(
    arms: Mapping[str, Sequence[ImageMatches]],
    draws: int = 1000,
    seed: int = 0,
    images_only: bool = False,
) -> dict[str, NDArray[np.float64]]:
    """Mean AP of each arm in resampled seeds and test images.

    A draw takes seeds and images with replacement, the same for every arm, so
    that the arms' differences may be formed draw by draw.

    Args:
        arms: By name, one run a seed, in the same order in every arm.
        draws: Number of draws, B.
        seed: Of the generator.
        images_only: Keep the seeds: what remains is the uncertainty of the
            test set for these very runs.

    Returns:
        Mean AP in [0, 1] by arm, (B,); NaN in a draw without any object.

    Raises:
        ValueError: If arms differ in seeds, images or objects.
    """
    _check_arms(arms)
    one = next(_runs(arms))
    seeds = len(next(iter(arms.values())))
    _, of_seeds = draw_counts(
        len(one.image_ids), seeds, draws, seed, images_only
    )
    found = {}
    for name, runs in arms.items():
        ap = np.stack([run.ap_of_resamples(draws, seed) for run in runs], 1)
        found[name] = (ap * of_seeds).sum(1) / seeds
    return found


def bootstrap(
    arms_a: Sequence[ImageMatches],
    arms_b: Sequence[ImageMatches],
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    images_only: bool = False,
) -> Interval:
    """Mean AP of arm a minus that of arm b, with a percentile interval.

    Seeds and images are resampled together, as both would differ in a
    repetition, and each for both arms alike. With few seeds percentiles are
    narrow: of six they cover about 85 % instead of 95 %. So this complements
    :func:`~mmkd.analysis.statistics.paired_interval` and does not replace it.

    Args:
        arms_a: One run a seed, (S,).
        arms_b: The runs of the same seeds, (S,).
        draws: Number of draws.
        seed: Of the generator.
        level: Share of draws inside the interval.
        images_only: Keep the seeds, see :func:`resample`.

    Returns:
        Difference in [−1, 1]; ``sd`` is its standard error, ``n`` the number
        of draws.
    """
    arms = dict(a=arms_a, b=arms_b)
    found = resample(arms, draws, seed, images_only)
    a, b = (np.mean([run.ap() for run in runs]) for runs in arms.values())
    return percentile_interval(a - b, found['a'] - found['b'], level)


def _results(truth: COCO, path: str | Path) -> COCO:
    results = read_json(path, 'ImageMatches', 'detections', kind=list)
    if results:
        return truth.loadRes(results)
    empty = COCO()  # loadRes looks into the first detection
    empty.dataset = dict(truth.dataset, annotations=[])
    empty.createIndex()
    return empty


def _by_area(parts: Sequence[tuple[int, ArrayLike]]) -> NDArray[np.bool_]:
    """Join what images gave, (T, d) each, to (A, T, D)."""
    return np.stack(
        [
            np.concatenate(
                [
                    np.zeros((len(IOUS), 0), bool),
                    *(part for one, part in parts if one == area),
                ],
                axis=1,
            ).astype(bool)
            for area in range(len(AREAS))
        ]
    )


def _threshold(iou: float) -> int:
    near = np.flatnonzero(np.isclose(IOUS, iou))
    if not len(near):
        raise ValueError(
            f'ImageMatches knows the IoUs 0.5, 0.55, …, 0.95, got iou={iou!r}.'
        )
    return int(near[0])


def _count_at_recall(objects: NDArray[np.intp]) -> NDArray[np.intp]:
    """Fewest found objects that reach each recall, (B,) → (B, R).

    Compared as floats, k / n >= r, as pycocotools does; 0.07 × 100 is above 7
    and would ask for 8.
    """
    objects = np.maximum(objects, 1)[:, None]
    count = np.maximum(np.floor(objects * RECALLS).astype(np.intp) - 1, 0)
    for _ in range(2):
        count += count / objects < RECALLS
    return count


def _runs(arms: Mapping[str, Sequence[ImageMatches]]) -> Iterator:
    return (run for runs in arms.values() for run in runs)


def _check_arms(arms: Mapping[str, Sequence[ImageMatches]]) -> None:
    counts = {name: len(runs) for name, runs in arms.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise ValueError(
            f'resample needs arms with one run for each of the same seeds, '
            f'got {counts or "none"}. Keep the seeds that all arms have.'
        )
    first, *others = _runs(arms)
    for other in others:
        if (
            other.image_ids != first.image_ids
            or other.classes != first.classes
            or not np.array_equal(other.objects, first.objects)
        ):
            raise ValueError(
                f'resample draws the same images for all runs, got runs on '
                f'different annotations: {len(first.image_ids)} and '
                f'{len(other.image_ids)} images, {first.objects[0].sum()} and '
                f'{other.objects[0].sum()} objects. Give all of them one '
                f'ann_file.'
            )
