"""From finished runs to the numbers of a report."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from mmkd.analysis.average_precision import ImageMatches, bootstrap
from mmkd.analysis.report import Case, draw_cases
from mmkd.analysis.statistics import (
    gap_closed,
    holm,
    paired_interval,
    paired_p,
    separated,
    sign_test,
)
from mmkd.laboratory.arms import Arm
from mmkd.laboratory.runs import DONE, Run
from mmkd.reading import read_json
from mmkd.version import __version__

#: Packages whose versions decide numbers.
PACKAGES = (
    'torch',
    'torchvision',
    'numpy',
    'scipy',
    'mmengine',
    'mmcv-lite',
    'mmcv',
    'mmdet',
    'onedl-mmengine',
    'onedl-mmcv',
    'onedl-mmdetection',
    'pycocotools',
)


@dataclass
class Trials:
    """Arms and their runs.

    Attributes:
        arms: In the order of the report.
        runs: By arm and seed.
        seeds: The seeds.
        teacher: The teacher's run.
    """

    arms: list[Arm]
    runs: dict[tuple[str, int], Run]
    seeds: Sequence[int]
    teacher: Run
    _matches: dict[Path, ImageMatches] = field(default_factory=dict)

    def matches(self, run: Run) -> ImageMatches:
        """A run's detections in the test images, compared with the truth."""
        if run.predictions not in self._matches:
            file = run.settings.test_evaluator.ann_file
            self._matches[run.predictions] = ImageMatches.from_files(
                file, run.predictions
            )
        return self._matches[run.predictions]

    def common(self, *arms: str) -> list[int]:
        """Seeds that are done in all of these arms."""
        return [
            seed
            for seed in self.seeds
            if all(self.runs[arm, seed].status == DONE for arm in arms)
        ]

    def scores(self, arm: str, seeds: Sequence[int]) -> np.ndarray:
        """AP in percent, (n,)."""
        return np.array(
            [100 * self.matches(self.runs[arm, seed]).ap() for seed in seeds]
        )


def metrics(found: ImageMatches) -> dict[str, Any]:
    """COCO's metrics in percent; None where there is no object."""

    def percent(value: float) -> float | None:
        return None if value < 0 or math.isnan(value) else 100 * value

    names = dict(AP=dict(), AP50=dict(iou=0.5), AP75=dict(iou=0.75)) | {
        f'AP{area[0]}': dict(area=area)
        for area in ('small', 'medium', 'large')
    }
    return {
        name: percent(found.ap(**which)) for name, which in names.items()
    } | dict(
        by_class={
            name: percent(value)
            for name, value in found.ap(by_class=True).items()
        }
    )


def arm_entry(trials: Trials, arm: Arm) -> dict:
    """An arm with all of its seeds, as the report wants it."""
    runs = []
    for seed in trials.seeds:
        run = trials.runs[arm.name, seed]
        done = run.status == DONE
        runs.append(
            dict(
                seed=seed,
                status='stale' if run.stale else run.status,
                reason=run.reason,
                metrics=metrics(trials.matches(run)) if done else None,
                curve=run.curve(),
                seconds=run.seconds() if done else None,
                diagnostics=diagnostics(run),
            )
        )
    first = trials.runs[arm.name, trials.seeds[0]]
    return dict(
        name=arm.name,
        title=arm.title,
        kind=arm.kind,
        method=arm.method,
        config=str(first.config),
        step_ratio=arm.step_ratio,
        iterations=first.iterations,
        runs=runs,
    )


def diagnostics(run: Run) -> list[dict]:
    """What a distilled run noted of itself, see ``DiagnosticsHook``."""
    path = run.folder / 'diagnostics.json'
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding='utf-8').splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # cut off while writing
            continue
    return lines


def comparisons(
    trials: Trials, teacher: float, draws: int = 1000
) -> list[dict]:
    """Every distilled arm against its controls, paired by seed.

    p-values of the methods against one kind of control are adjusted together.

    Args:
        trials: The runs.
        teacher: The teacher's AP in percent.
        draws: Of the bootstrap; 0 leaves it out.
    """
    found, families = [], {}
    for arm in trials.arms:
        if arm.kind not in ('distilled', 'inherited'):
            continue
        for control in controls(trials.arms, arm):
            seeds = trials.common(arm.name, control.name)
            if not seeds:
                continue
            one = _comparison(
                trials, arm.name, control.name, seeds, teacher, draws
            )
            found.append(one)
            families.setdefault(control.kind, {})[arm.name] = one
    for family in families.values():
        adjusted = holm({name: one['p'] for name, one in family.items()})
        for name, one in family.items():
            one['p_holm'] = adjusted[name]
    return found


def controls(arms: Sequence[Arm], arm: Arm) -> list[Arm]:
    """What an arm is compared with: alone, as long alone, sham, inherited."""
    return [
        one
        for one in arms
        if one.kind == 'alone'
        or (one.kind == 'time' and arm.method in one.method.split(','))
        or (one.kind == 'sham' and one.method == arm.method)
    ]


def _comparison(
    trials: Trials,
    arm: str,
    against: str,
    seeds: Sequence[int],
    teacher: float,
    draws: int,
) -> dict:
    one, other = (trials.scores(name, seeds) for name in (arm, against))
    interval = paired_interval(one - other)
    sign = sign_test(one - other)
    entry = dict(
        arm=arm,
        against=against,
        differences=dict(zip(map(str, seeds), (one - other).tolist())),
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        sd=interval.sd,
        n=interval.n,
        wins=sign.wins,
        losses=sign.losses,
        sign_p=sign.p,
        p=paired_p(one - other),
        bootstrap=None,
        gap_closed=gap_closed(one, other, teacher).as_dict(),
    )
    if draws:
        drawn = bootstrap(
            *(
                [trials.matches(trials.runs[name, seed]) for seed in seeds]
                for name in (arm, against)
            ),
            draws=draws,
        )
        entry['bootstrap'] = dict(
            low=100 * drawn.low, high=100 * drawn.high, draws=draws
        )
    return entry


def ranking(trials: Trials) -> list[list[str]]:
    """Methods ranked as far as the seeds tell them apart."""
    names = [arm.name for arm in trials.arms if arm.kind == 'distilled']
    names = [name for name in names if trials.common(name)]
    seeds = trials.common(*names) if names else []
    if len(names) < 2 or len(seeds) < 2:
        return [names] if names else []
    return separated({name: trials.scores(name, seeds) for name in names})


def data_facts(settings: Config) -> dict:
    """What a data set holds."""
    facts: dict[str, Any] = {}
    for split, evaluator in (('train', None), ('test', 'test_evaluator')):
        dataset = settings[f'{split}_dataloader'].dataset
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        file = (
            settings[evaluator].ann_file
            if evaluator
            else Path(dataset.get('data_root') or '', dataset.ann_file)
        )
        content = read_json(file, split, 'COCO annotations', kind=dict)
        facts[f'{split}_images'] = len(content['images'])
        facts[f'{split}_boxes'] = sum(
            not one.get('iscrowd') for one in content['annotations']
        )
    return facts


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = dict(mmkd=__version__, python=platform.python_version())
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The processor in words."""
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        lines = [
            line.split(':', 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith('model name')
        ]
        name = lines[0] if lines else name
    gpu = (
        f', {torch.cuda.get_device_name()}'
        if torch.cuda.is_available()
        else ''
    )
    return f'{name}, {os.cpu_count()} cores{gpu}'


def show_cases(
    trials: Trials, arm: str, path: Path, count: int = 3
) -> list[str]:
    """Draw the test images that gain most and least from a method.

    Of the first seed that is done; an image's score is explained at
    :meth:`~mmkd.analysis.average_precision.ImageMatches.per_image`.

    Returns:
        A line an image: its name, and its score alone and distilled.
    """
    seeds = trials.common('alone', arm)
    if not seeds:
        return []
    runs = dict(
        teacher=trials.teacher,
        alone=trials.runs['alone', seeds[0]],
        distilled=trials.runs[arm, seeds[0]],
    )
    scores = {
        name: trials.matches(run).per_image() for name, run in runs.items()
    }
    gain = scores['distilled'] - scores['alone']
    order = [one for one in np.argsort(-gain) if not math.isnan(gain[one])]
    chosen = [*order[:count], *order[-count:]]
    settings = runs['alone'].settings
    content = read_json(
        settings.test_evaluator.ann_file, 'test', 'COCO annotations', kind=dict
    )
    ids = trials.matches(runs['alone']).image_ids
    known = {one['id']: one for one in content['images']}
    dataset = settings.test_dataloader.dataset
    root = Path(dataset.get('data_root') or '') / dataset.data_prefix.img
    labels = {
        one['id']: place
        for place, one in enumerate(
            sorted(content['categories'], key=lambda one: one['id'])
        )
    }
    found = {
        name: _boxes(read_json(run.predictions, name), labels, 0.3)
        for name, run in runs.items()
    }
    truth = _boxes(
        [one for one in content['annotations'] if not one.get('iscrowd')],
        labels,
    )
    nothing = ([], [], [])
    draw_cases(
        [
            Case(
                root / known[ids[place]]['file_name'],
                (lambda x: (x[0], None, x[2]))(truth.get(ids[place], nothing)),
                *(found[name].get(ids[place], nothing) for name in runs),
            )
            for place in chosen
        ],
        path,
        trials.matches(runs['alone']).classes,
    )
    return [
        f'{known[ids[place]]["file_name"]}: {scores["alone"][place]:.2f} '
        f'alone, {scores["distilled"][place]:.2f} distilled'
        for place in chosen
    ]


def _boxes(
    entries: Sequence[Mapping], labels: Mapping[int, int], score: float = 0.0
) -> dict[Any, tuple[list, list, list]]:
    """Boxes x1 y1 x2 y2, scores and labels by image."""
    found: dict[Any, tuple[list, list, list]] = {}
    key = lambda one: one['image_id']  # noqa: E731
    for image, group in itertools.groupby(sorted(entries, key=key), key):
        boxes: tuple[list, list, list] = ([], [], [])
        for one in group:
            if one.get('score', 1.0) < score:
                continue
            x, y, width, height = one['bbox']
            boxes[0].append([x, y, x + width, y + height])
            boxes[1].append(one.get('score', 1.0))
            boxes[2].append(labels[one['category_id']])
        found[image] = boxes
    return found
