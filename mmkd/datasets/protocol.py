"""Protocol: training sets with wrong labels, or with few of some classes.

Both stand around a data set of boxes in a config and return that very data
set with other annotations, so that samplers, filters and further wrappers find
what they know. What is done to an image depends on a seed and on the image's
own id: neither on its place, nor on what else is in the set.

Reference:
    Sarfraz et al., "Knowledge Distillation Beyond Model Compression",
    arXiv:2007.01922, train classifiers under symmetric label noise and
    exponential imbalance of classes; known second-hand. What becomes of boxes
    is ours.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mmengine.dataset import BaseDataset

from mmkd.build import build
from mmkd.checks import check_fraction, check_name
from mmkd.registry import DATASETS

#: Shortest side that is left of a jittered box, pixels.
SHORTEST = 1.0
#: What the classes of a set may be put in order by.
ORDERS = ('index', 'frequency')

#: One image's entry in a data set's list.
Entry = dict


@DATASETS.register_module(name='NoisyLabels')
def noisy_labels(
    dataset: Mapping,
    p: float,
    box_jitter: float = 0.0,
    seed: int = 0,
    lazy_init: bool = False,
) -> BaseDataset:
    """A training set of which some objects have another class.

    Each object keeps its class with probability 1 - p, and else becomes one of
    the other classes, all alike. The objects that are wrong at one p are wrong
    at a greater one as well, and likewise. Ignored objects stay as they are,
    and so do masks.

    Args:
        dataset: Config of the set, of MMDetection's kind.
        p: Share of the objects whose class is wrong.
        box_jitter: Each edge of a box is moved by at most so much of the box's
            width or height, evenly drawn, and stays in the image.
        seed: Of what is drawn.
        lazy_init: Leave the annotations unread for now, as MMEngine's sets do.

    Raises:
        ValueError: If the set is one to test on, or has a single class.

    Example:
        A config's training set, a fifth of whose labels are wrong::

            train_dataloader = dict(
                dataset=dict(
                    _delete_=True,
                    type='mmkd.NoisyLabels',
                    dataset=_base_.train_dataloader.dataset,
                    p=0.2,
                )
            )
    """
    who = 'NoisyLabels'
    check_fraction(who, p=p, box_jitter=box_jitter)
    built = _built(who, dataset)
    count = len(built.metainfo.get('classes') or ())
    if p and count < 2:
        raise ValueError(
            f'{who} changes classes into others, but the set has {count}. '
            f'Set p=0 for its boxes alone, or metainfo=dict(classes=…) in it.'
        )

    def change(entries: list[Entry]) -> list[Entry]:
        return [_noisy(one, count, p, box_jitter, seed) for one in entries]

    return _changed(built, change, lazy_init)


def _noisy(
    entry: Entry, classes: int, p: float, jitter: float, seed: int
) -> Entry:
    entry = copy.copy(entry)
    entry['instances'] = instances = [
        copy.copy(one) for one in entry.get('instances', [])
    ]
    draws = _draws('NoisyLabels', entry, seed, (len(instances), 6))
    for one, (wrong, which, *edges) in zip(instances, draws):
        if one.get('ignore_flag'):
            continue
        if wrong < p:
            away = 1 + int(which * (classes - 1))
            one['bbox_label'] = (one['bbox_label'] + away) % classes
        if jitter:
            one['bbox'] = _jittered(
                one['bbox'], edges, jitter, entry['width'], entry['height']
            )
    return entry


def _jittered(
    box: Sequence[float],
    draws: Sequence[float],
    jitter: float,
    width: float,
    height: float,
) -> list[float]:
    corners = np.asarray(box, dtype=np.float64)
    sides = np.tile(corners[2:] - corners[:2], 2)
    moved = corners + jitter * sides * (2 * np.asarray(draws) - 1)
    moved = np.clip(moved, 0, [width, height, width, height])
    # Two edges that have passed each other would leave no box.
    low, high = moved[:2], moved[2:]
    turned = high - low < SHORTEST
    return np.where(np.tile(turned, 2), corners, moved).tolist()


@DATASETS.register_module(name='ImbalancedSubset')
def imbalanced_subset(
    dataset: Mapping,
    factor: float,
    order: str | Sequence[int] = 'index',
    seed: int = 0,
    lazy_init: bool = False,
) -> BaseDataset:
    r"""A training set with exponentially fewer objects from class to class.

    The class of rank r among K keeps the share :math:`f^{-r / (K - 1)}` of its
    objects: all of the first, one in f of the last. The others are ignored: no
    object and, for assigners that know the notion (``ignore_iof_thr`` of at
    least 0), no background either. An image of which no object is kept leaves
    the set; one that had none stays. What is kept at one factor is kept at a
    smaller one as well.

    Args:
        dataset: Config of the set, of MMDetection's kind.
        factor: How many times smaller the last share is than the first, at
            least 1.
        order: Ranks of the classes: ``'index'``, as they are counted,
            ``'frequency'``, the most frequent one first, or the indices
            themselves.
        seed: Of what is drawn.
        lazy_init: Leave the annotations unread for now, as MMEngine's sets do.

    Raises:
        ValueError: If the set is one to test on, or a setting is out of range.

    Example:
        A hundred times fewer of the rarest class::

            train_dataloader = dict(
                dataset=dict(
                    _delete_=True,
                    type='mmkd.ImbalancedSubset',
                    dataset=_base_.train_dataloader.dataset,
                    factor=100,
                    order='frequency',
                )
            )
    """
    who = 'ImbalancedSubset'
    if not factor >= 1:
        raise ValueError(
            f'{who} needs factor >= 1, the largest share over the smallest; '
            f'got factor={factor!r}.'
        )
    if isinstance(order, str):
        check_name(who, 'order', order, ORDERS)
    built = _built(who, dataset)
    count = len(built.metainfo.get('classes') or ())
    if not isinstance(order, str) and sorted(order) != list(range(count)):
        raise ValueError(
            f'{who} needs the index of each of the {count} classes once in '
            f'order=, got {list(order)}. Write them from the first to the '
            f'last, or choose one of {", ".join(ORDERS)}.'
        )

    def change(entries: list[Entry]) -> list[Entry]:
        shares = class_shares(_ranks(order, entries, count), factor)
        kept = (_thinned(one, shares, seed) for one in entries)
        return [one for one in kept if one is not None]

    return _changed(built, change, lazy_init)


def class_shares(ranks: Sequence[int], factor: float) -> list[float]:
    """Share of its objects that each class keeps.

    Args:
        ranks: Rank of each class, 0 for the one that keeps all.
        factor: The first share over the last.

    Example:
        >>> class_shares([2, 0, 1], factor=100)
        [0.01, 1.0, 0.1]
    """
    last = max(len(ranks) - 1, 1)
    return [factor ** (-rank / last) for rank in ranks]


def _ranks(
    order: str | Sequence[int], entries: Sequence[Entry], count: int
) -> list[int]:
    if order == 'index':
        return list(range(count))
    if order == 'frequency':
        labels = [
            one['bbox_label']
            for entry in entries
            for one in entry.get('instances', [])
            if not one.get('ignore_flag')
        ]
        found = np.bincount(np.asarray(labels, dtype=int), minlength=count)
        order = np.argsort(-found, kind='stable').tolist()
    ranks = [0] * count
    for rank, one in enumerate(order):
        ranks[one] = rank
    return ranks


def _thinned(entry: Entry, shares: Sequence[float], seed: int) -> Entry | None:
    entry = copy.copy(entry)
    entry['instances'] = instances = [
        copy.copy(one) for one in entry.get('instances', [])
    ]
    draws = _draws('ImbalancedSubset', entry, seed, (len(instances),))
    objects = kept = 0
    for one, draw in zip(instances, draws):
        if one.get('ignore_flag'):
            continue
        objects += 1
        if draw < shares[one['bbox_label']]:
            kept += 1
        else:
            one['ignore_flag'] = 1
    return None if objects and not kept else entry


def _built(who: str, config: Mapping) -> BaseDataset:
    """The set inside, whose annotations are not read yet."""
    built = build(
        dict(config, lazy_init=True), f'the data set in {who}', DATASETS
    )
    if not isinstance(built, BaseDataset):
        raise ValueError(
            f'{who} changes the annotations of a data set, got a '
            f'{type(built).__name__}. Put {who} around the set inside of it.'
        )
    if built.test_mode:
        raise ValueError(
            f'{who} is for training: what is tested on keeps its labels. The '
            f'{type(built).__name__} inside has test_mode=True; take {who} '
            f'away from it.'
        )
    return built


def _changed(
    dataset: BaseDataset,
    change: Callable[[list[Entry]], list[Entry]],
    lazy_init: bool,
) -> BaseDataset:
    """A set whose list is changed as it is read, before it is filtered."""
    read = dataset.load_data_list
    dataset.load_data_list = lambda: change(read())
    if not lazy_init:
        try:
            dataset.full_init()
        finally:
            del dataset.load_data_list  # a copy in a worker need not know it
    return dataset


def _draws(
    who: str, entry: Entry, seed: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Numbers in [0, 1) that an image has for itself."""
    name = f'{who}:{seed}:{entry["img_id"]}'.encode()
    digest = hashlib.sha256(name).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], 'little'))
    return generator.random(shape)
