"""What past trainings were like, how they were set, and what came out."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from mmengine.config import Config
from torch import nn

from mmkd.analysis.cost import parameters
from mmkd.files import whole
from mmkd.reading import read_json

#: Past runs above which a regression is asked, and neighbours up to there.
ENOUGH, NEIGHBOURS = 50, 5
#: Bounds of the temperature that a regression may say.
TEMPERATURES = (2.0, 8.0)
#: Quantiles of the sizes of objects that describe a data set.
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class PastRun:
    """One training that was carried through.

    Attributes:
        features: What data and models are like, :func:`meta_features`.
        configuration: How it was set, :func:`configuration_of`.
        result: The student's AP, in percent.
        chain: Its models from teacher to student.
    """

    features: Mapping[str, float]
    configuration: Mapping[str, float]
    result: float
    chain: Sequence[str] = ()


class RunMemory:
    """Past runs, in one JSON file that is always whole.

    Args:
        path: The file; none is needed before the first run.

    Raises:
        ValueError: If the file is no memory of runs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.runs: list[PastRun] = []
        if not self.path.is_file():
            return
        try:
            content = read_json(self.path, '--memory', kind=dict)
            self.runs = [_past_run(**one) for one in content['runs']]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{self.path} is no memory of runs ({error}). Name another '
                f'file with --memory.'
            ) from error

    def add(self, run: PastRun) -> None:
        """Keep a run, unless the very same is there, and write the file."""
        kept = json.loads(json.dumps(asdict(run)))
        if any(json.loads(json.dumps(asdict(x))) == kept for x in self.runs):
            return
        self.runs.append(PastRun(**kept))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as part:
            content = dict(runs=[asdict(one) for one in self.runs])
            part.write_text(json.dumps(content, indent=1), encoding='utf-8')

    def suggest(self, features: Mapping[str, float]) -> dict | None:
        """How to set a training of such data and models.

        Args:
            features: Of data and models.

        Returns:
            The configuration of an identical past run, of several the best;
            else what a regression over more than 50 runs says; else the mean
            of the 5 that are most alike; None if there is none.

        Raises:
            ModuleNotFoundError: If the regression has no scikit-learn.
        """
        wanted = dict(features)
        same = [one for one in self.runs if dict(one.features) == wanted]
        if same:
            return dict(max(same, key=lambda one: one.result).configuration)
        if not self.runs:
            return None
        if len(self.runs) > ENOUGH:
            return regressed(self.runs, wanted)
        return averaged(self.runs, wanted)


def _past_run(
    features: Mapping[str, float],
    configuration: Mapping[str, float],
    result: float,
    chain: Sequence[str] = (),
) -> PastRun:
    """A run as a file has it, which may have been written by anyone.

    Raises:
        TypeError: If something in it is no number.
    """
    for one in (*features.values(), *configuration.values(), result):
        if not isinstance(one, (int, float)):
            raise TypeError(f'{one!r:.40} is no number')
    return PastRun(features, configuration, result, chain)


def averaged(
    runs: Sequence[PastRun], features: Mapping[str, float]
) -> dict[str, float]:
    """Mean configuration of the runs whose features point the same way.

    Features are compared by the cosine of their logarithms: else the number
    of images would be all that counts.

    Example:
        >>> runs = [PastRun(dict(a=1), dict(lr=x), 0.0) for x in (1.0, 3.0)]
        >>> averaged(runs, dict(a=2))
        {'lr': 2.0}
    """
    near = sorted(runs, key=lambda one: -cosine(one.features, features))
    near = near[:NEIGHBOURS]
    names = dict.fromkeys(key for one in near for key in one.configuration)
    return {
        name: fmean(
            one.configuration[name]
            for one in near
            if name in one.configuration
        )
        for name in names
    }


def cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Cosine of the angle between two descriptions, after a logarithm.

    Example:
        >>> round(cosine(dict(a=1.0, b=2.0), dict(a=1.0, b=2.0)), 6)
        1.0
    """
    a, b = (_vector(x, sorted({*one, *other})) for x in (one, other))
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def regressed(
    runs: Sequence[PastRun], features: Mapping[str, float]
) -> dict[str, float]:
    """What gradient boosting says, one regression for each setting.

    A run counts as much as its AP. Settings are learned as logarithms, since
    learning rates differ by factors.
    """
    try:
        from sklearn.ensemble import GradientBoostingRegressor
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'More than {ENOUGH} past runs are asked by a regression of '
            f'scikit-learn, which is not installed. Type: pip install '
            f'scikit-learn; or leave out --suggest.'
        ) from error
    known = sorted({key for one in runs for key in one.features})
    names = dict.fromkeys(key for one in runs for key in one.configuration)
    found = {}
    for name in names:
        having = [one for one in runs if one.configuration.get(name, 0) > 0]
        if not having:
            continue
        model = GradientBoostingRegressor(random_state=0)
        model.fit(
            np.stack([_vector(one.features, known) for one in having]),
            [math.log(one.configuration[name]) for one in having],
            sample_weight=[max(one.result, 1e-3) for one in having],
        )
        (value,) = model.predict(_vector(features, known)[None])
        found[name] = math.exp(value)
    if 'temperature' in found:
        low, high = TEMPERATURES
        found['temperature'] = min(max(found['temperature'], low), high)
    return found


def _vector(features: Mapping[str, float], names: Sequence[str]) -> Any:
    return np.array(
        [math.log1p(max(features.get(name, 0.0), 0.0)) for name in names]
    )


# ----------------------------------------------------------- what is described


def meta_features(
    annotations: Mapping[str, Any], teacher: nn.Module, student: nn.Module
) -> dict[str, float]:
    """What data and models are like, in some twenty numbers.

    Args:
        annotations: Content of the training set's file, in COCO's format.
        teacher, student: The two detectors, built.
    """
    images = annotations['images']
    boxes = [
        one for one in annotations['annotations'] if not one.get('iscrowd')
    ]
    area = {one['id']: one['width'] * one['height'] for one in images}
    sizes = [
        math.sqrt(one['bbox'][2] * one['bbox'][3] / area[one['image_id']])
        for one in boxes
    ] or [0.0]
    shapes = [
        max(one['bbox'][2], 1e-6) / max(one['bbox'][3], 1e-6) for one in boxes
    ] or [1.0]
    counts = Counter(one['category_id'] for one in boxes)
    shares = np.array(list(counts.values()) or [1])
    shares = shares / shares.sum()
    found = dict(
        images=len(images),
        classes=len(annotations['categories']),
        boxes=len(boxes),
        boxes_an_image=len(boxes) / max(len(images), 1),
        images_without_boxes=1
        - len({one['image_id'] for one in boxes}) / max(len(images), 1),
        width=fmean(one['width'] for one in images),
        height=fmean(one['height'] for one in images),
        aspect=float(np.median(shapes)),
        rarest_class=float(shares.min()),
        commonest_class=float(shares.max()),
        class_entropy=float(-(shares * np.log(shares)).sum()),
    )
    for quantile in QUANTILES:
        found[f'size_{quantile:.0%}'] = float(np.quantile(sizes, quantile))
    for side, model in dict(teacher=teacher, student=student).items():
        layers = [
            one
            for one in model.modules()
            if isinstance(one, (nn.Conv2d, nn.Linear))
        ]
        found[f'{side}_parameters'] = parameters(model)
        found[f'{side}_layers'] = len(layers)
        found[f'{side}_channels'] = max(one.weight.shape[0] for one in layers)
    found['ratio'] = found['student_parameters'] / found['teacher_parameters']
    found['same_head'] = float(_head(teacher) is _head(student))
    return {name: float(value) for name, value in found.items()}


def _head(model: nn.Module) -> type:
    return type(getattr(model, 'bbox_head', getattr(model, 'roi_head', None)))


#: Terms' settings that are configuration, and how they are called there.
SETTINGS = {'temperature': 'temperature', 'loss_weight': 'alpha'}


def configuration_of(settings: Config, eps: float) -> dict[str, float]:
    """How a distillation is set, in the numbers that a memory keeps.

    Args:
        settings: Its config.
        eps: Least relative gain of a further link.

    Returns:
        Learning rate, weight decay, ``eps``; ``alpha``, the mean weight of
        the terms' losses, and ``temperature``, their mean temperature, where
        they have any.
    """
    optimiser = settings.optim_wrapper.optimizer
    found = dict(
        lr=float(optimiser.lr),
        weight_decay=float(optimiser.get('weight_decay', 0.0)),
        eps=float(eps),
    )
    for name, called in SETTINGS.items():
        values = [
            holder[name]
            for holder in _holders(settings.model.get('terms', {}), name)
        ]
        if values:
            found[called] = fmean(values)
    return found


def configure(settings: Config, configuration: Mapping[str, float]) -> Config:
    """A config that is set as a memory says.

    Several temperatures or weights keep their ratios.

    Args:
        settings: Config of a distillation; it is left as it is.
        configuration: What :meth:`RunMemory.suggest` returned.
    """
    settings = copy.deepcopy(settings)
    optimiser = settings.optim_wrapper.optimizer
    for name in ('lr', 'weight_decay'):
        if name in configuration:
            optimiser[name] = configuration[name]
    before = configuration_of(settings, 1.0)
    for name, called in SETTINGS.items():
        if configuration.get(called) and before.get(called):
            factor = configuration[called] / before[called]
            for holder in _holders(settings.model.terms, name):
                holder[name] = factor * holder[name]
    return settings


def _holders(config: Any, name: str) -> list[Any]:
    """Every dict below that has a number of this name."""
    found = []
    if isinstance(config, Mapping):
        if isinstance(config.get(name), (int, float)):
            found.append(config)
        for value in config.values():
            found += _holders(value, name)
    elif isinstance(config, (list, tuple)):
        for value in config:
            found += _holders(value, name)
    return found
