"""The arms of a comparison: what is trained, as configs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict

from mmkd.configs import (
    OPTIONAL_KEYS,
    OWN_KEYS,
    read_config,
    student_config,
)
from mmkd.datasets.photographs import check_loader, mixed
from mmkd.laboratory.digests import custom_imports
from mmkd.laboratory.runs import iterations
from mmkd.recipes import INHERIT, RECIPES, Pair, inherits, recipe

#: A part of the schedule that starts at 0 and ends within this share of the
#: training is a warm-up, whose length a longer training keeps.
WARM_UP = 0.2
#: What the name of an arm ends with whose teacher also teaches on these.
UNLABELLED = '_unlabelled'
#: How often a distilled run measures what its terms do.
MEASUREMENTS = 10


@dataclass(frozen=True)
class Arm:
    """One way of training, for every seed.

    Attributes:
        name: Name of its folder, and in reports.
        title: How a report calls it.
        kind: ``'alone'``, ``'time'``, ``'distilled'``, ``'sham'`` or
            ``'inherited'``.
        settings: Its config, without seed.
        method: The method it learns by.
        step_ratio: Time of a step relative to the student's alone.
        unlabelled: Whether the teacher also teaches on the images that this
            seed gives no labels.
    """

    name: str
    title: str
    kind: str
    settings: Config = field(repr=False)
    method: str | None = None
    step_ratio: float | None = None
    unlabelled: bool = False


def alone(student: Config) -> Arm:
    """The student without a teacher."""
    return Arm('alone', 'student alone', 'alone', student, step_ratio=1.0)


def same_time(student: Config, ratio: float, methods: Sequence[str]) -> Arm:
    """The student alone, trained as long as a distilled one takes.

    Args:
        student: The student's config.
        ratio: Time of a distilled step relative to one alone. The settings
            of 1 are the student's own, so that it need not be trained twice.
        methods: The methods that take this long.
    """
    return Arm(
        f'alone_x{ratio:.2f}',
        f'student alone, {ratio:.2f} times the steps',
        'time',
        student if ratio == 1 else stretch(student, ratio),
        method=','.join(methods),
        step_ratio=1.0,
    )


def distilled(
    student: Config,
    teacher: Mapping,
    pair: Pair,
    method: str,
    share: float | None = None,
) -> Arm:
    """The student taught by a method.

    Args:
        student: The student's config.
        teacher: Config and checkpoint of the teacher.
        pair: What the two have in common.
        method: A recipe's name, or the path of a config with ``terms``.
        share: Weight by gradient; None keeps published weights.
    """
    own = read_config(method) if method not in RECIPES else None
    name = Path(method).stem
    if own is not None:
        added, teacher = _taken_from(own, teacher, method)
    else:
        added = dict(terms=recipe(method, pair, share))
        teacher = dict(teacher, inherit=inherits(method, pair))
    settings = copy.deepcopy(student)
    plain = student_config(settings.model)
    kind = plain.type
    settings.model = ConfigDict(
        plain,
        type='mmkd.Distiller',
        student=kind,
        teachers={pair.teacher: dict(teacher, sham=False)},
        **added,
    )
    settings.custom_hooks = [
        *(settings.get('custom_hooks') or []),
        dict(
            type='mmkd.DiagnosticsHook',
            interval=max(iterations(settings) // MEASUREMENTS, 1),
        ),
    ]
    if own is not None:
        _take_the_rest(settings, own)
    kind = 'inherited' if method == INHERIT else 'distilled'
    return Arm(name, name, kind, settings, name)


def sham(arm: Arm, word: str, **teacher: Any) -> Arm:
    """A distilled arm whose teacher knows nothing of the image: a control.

    Args:
        arm: The arm.
        word: What the teacher is.
        **teacher: The arguments that make it that.
    """
    settings = copy.deepcopy(arm.settings)
    for one in settings.model.teachers.values():
        one.update(teacher)
    return replace(
        arm,
        name=f'{arm.name}_{word}',
        title=f'{arm.title}, {word}',
        kind='sham',
        settings=settings,
    )


def unlabelled(arm: Arm, folder: str | None = None) -> Arm:
    """A distilled arm whose teacher also teaches on images without labels.

    Half of each batch is labelled, so that a step costs what it cost.

    Args:
        arm: The arm.
        folder: Where these images lie; those of the training set whose labels
            the student does not have if None.

    Raises:
        FileNotFoundError: If the folder has no photographs.
        ValueError: If it trains on one image at a time, or its sampler
            chooses images by itself.
    """
    settings = copy.deepcopy(arm.settings)
    check_loader(settings.train_dataloader)
    if folder is not None:
        settings = mixed(settings, folder)
    return replace(
        arm,
        name=f'{arm.name}{UNLABELLED}',
        title=f'{arm.title}, unlabelled images too',
        method=f'{arm.method}{UNLABELLED}',
        settings=settings,
        unlabelled=folder is None,
    )


def _taken_from(
    own: Config, teacher: Mapping, method: str
) -> tuple[dict, dict]:
    """What a config adds to the student's model, and its teacher."""
    missing = [key for key in OWN_KEYS if key not in own.model]
    if missing:
        raise ValueError(
            f'{method} is no distillation config: its model has no '
            f'{missing[0]!r}. Name a config of type mmkd.Distiller, or a '
            f'recipe: {", ".join(RECIPES)}.'
        )
    if len(own.model.teachers) > 1:
        raise ValueError(
            f'{method} has {len(own.model.teachers)} teachers; a comparison '
            f'has one.'
        )
    name, (extra,) = 'teacher', own.model.teachers.values()
    model = copy.deepcopy(own.model.to_dict())
    added = {
        key: model[key] for key in ('terms', *OPTIONAL_KEYS) if key in model
    }
    _rename(added['terms'], next(iter(own.model.teachers)), name)
    return added, dict(teacher, inherit=extra.get('inherit', False))


def _rename(terms: dict, old: str, new: str) -> None:
    for value in terms.values():
        if isinstance(value, dict):
            if value.get('teacher') == old:
                value['teacher'] = new
            _rename(value, old, new)


def _take_the_rest(settings: Config, own: Config) -> None:
    """What a method's config names besides the model: the clipping, and
    modules to import.

    Raises:
        ValueError: If it shows photographs that the student alone has not.
    """
    dataset = (own.get('train_dataloader') or {}).get('dataset') or {}
    if 'unlabelled' in dataset:
        raise ValueError(
            f'{own.filename} also shows photographs without labels, and '
            f'methods are compared on the same images. Take them out of it, '
            f'and ask for an arm of their own: --arms alone time unlabelled '
            f'sham --unlabelled {dataset["unlabelled"]}'
        )
    clip = own.get('optim_wrapper', {}).get('clip_grad')
    if clip:
        settings.optim_wrapper.clip_grad = clip
    modules = [*custom_imports(settings), *custom_imports(own)]
    if modules:
        settings.custom_imports = dict(
            imports=modules, allow_failed_imports=False
        )


def stretch(settings: Config, ratio: float) -> Config:
    """A config that trains longer, its schedule stretched with it.

    Warm-ups keep their length. Epochs are rounded up.

    Args:
        settings: A training config.
        ratio: Of the new length to the old, 1 or more.

    Example:
        >>> decay = dict(type='MultiStepLR', by_epoch=False, milestones=[80])
        >>> longer = stretch(
        ...     Config(
        ...         dict(
        ...             train_cfg=dict(max_iters=100), param_scheduler=[decay]
        ...         )
        ...     ),
        ...     1.5,
        ... )
        >>> longer.train_cfg.max_iters, longer.param_scheduler[0].milestones
        (150, [120])
    """
    settings = copy.deepcopy(settings)
    loop = settings.train_cfg
    unit = 'max_epochs' if 'max_epochs' in loop else 'max_iters'
    old = loop[unit]
    loop[unit] = new = math.ceil(round(old * ratio, 6))
    by_epoch = unit == 'max_epochs'
    found = settings.get('param_scheduler') or []
    schedulers = list(found) if isinstance(found, (list, tuple)) else [found]
    warm = max(
        (
            one['end']
            for one in schedulers
            if one.get('begin', 0) == 0
            and 0 < one.get('end', 0) <= WARM_UP * old
            and one.get('by_epoch', True) == by_epoch
        ),
        default=0,
    )

    def moved(place: int) -> int:
        if place <= warm:
            return place
        return round(warm + (place - warm) * (new - warm) / (old - warm))

    for one in schedulers:
        if one.get('by_epoch', True) != by_epoch:
            continue  # a warm-up counted in iterations
        begin, end = one.get('begin', 0), one.get('end')
        for key in ('begin', 'end'):
            if one.get(key) is not None:
                one[key] = moved(one[key])
        if 'milestones' in one:
            one['milestones'] = [moved(place) for place in one['milestones']]
        if one.get('T_max') is not None:
            last = begin + one['T_max'] if end is None else end
            one['T_max'] = moved(last) - moved(begin)
    return settings


def seeded(arm: Arm, seed: int, labels: int | None, images: int) -> Config:
    """An arm's config for one seed.

    The seed fixes initial weights, order of images and their augmentation, as
    in every training, and here also which images are labelled: the same in
    all arms.

    Args:
        arm: The arm.
        seed: The seed.
        labels: Number of images the student trains on; all if None.
        images: Images in the training set.

    Raises:
        ValueError: If there are fewer images.
    """
    settings = copy.deepcopy(arm.settings)
    settings.randomness = ConfigDict(
        settings.get('randomness') or {}, seed=seed
    )
    if labels is not None:
        loader = settings.train_dataloader
        chosen = subset(seed, labels, images)
        if arm.unlabelled:
            _add_unlabelled(loader, chosen, images)
        else:
            _innermost(loader.dataset).indices = chosen
    return settings


def _innermost(dataset: ConfigDict) -> ConfigDict:
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def _add_unlabelled(
    loader: ConfigDict, chosen: Sequence[int], images: int
) -> None:
    """Half of each batch from those that were not chosen."""
    few, many = loader.dataset, copy.deepcopy(loader.dataset)
    _innermost(few).indices = list(chosen)
    inner = _innermost(many)
    inner.indices = sorted(set(range(images)) - set(chosen))
    inner.pipeline = [
        one for one in inner.pipeline if one.type != 'LoadAnnotations'
    ]
    loader.dataset = ConfigDict(type='ConcatDataset', datasets=[few, many])
    loader.batch_sampler = dict(type='mmkd.PartlyLabelledBatchSampler')


def subset(seed: int, labels: int, images: int) -> list[int]:
    """Which images are labelled; those of fewer labels are among them.

    Example:
        >>> set(subset(0, 2, 10)) < set(subset(0, 5, 10))
        True
    """
    if not 0 < labels <= images:
        raise ValueError(
            f'labels={labels} of a training set of {images} images. Ask for 1 '
            f'to {images}.'
        )
    order = np.random.default_rng([seed, 20]).permutation(images)
    return sorted(order[:labels].tolist())
