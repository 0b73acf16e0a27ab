"""In which ways a teacher can run, and how long each of them takes.

A user of mmdet would call the whole detector under ``no_grad``. A teacher here
stops behind the last tap, and with ``fast=`` a copy of it runs, as
:mod:`mmkd.fast` describes. All ways take turns on the same batches, as the
steps of :mod:`mmkd.laboratory.benchmark` do.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from mmengine.config import Config

from mmkd.laboratory.benchmark import (
    Arm,
    Clock,
    Settings,
    TeacherPass,
    built,
    load,
    rounds,
)
from mmkd.teachers import run_detector

#: What ``fast=`` is, by the words of a report.
FAST: Mapping[str, bool | Mapping[str, Any]] = {
    'as far as the taps': False,
    'the same, channels last, BatchNorm folded': dict(precision='fp32'),
    'the same in bfloat16': dict(precision='bf16'),
}
#: The whole detector, head included, under ``no_grad``.
WHOLE = 'whole'


@dataclass(frozen=True)
class Ways:
    """What was measured of the teachers of one config.

    Attributes:
        config: Its name.
        ways: Seconds of a batch, by way and round.
        notes: What else ran than was asked for, by way.
        facts: What was run where.
    """

    config: str
    ways: Mapping[str, list[float]]
    notes: Mapping[str, str]
    facts: Mapping[str, Any]

    def share(self, way: str) -> float:
        """Of the time that the whole detector takes; medians."""
        return self.seconds(way) / self.seconds(WHOLE)

    def seconds(self, way: str) -> float:
        return statistics.median(self.ways[way])

    def as_dict(self) -> dict:
        return asdict(self)

    def report(self) -> str:
        """What was measured, in lines."""
        width = max(map(len, self.ways))
        lines = [f'  {"teacher":{width}}{"ms a batch":>12}{"of whole":>10}']
        for way in self.ways:
            lines.append(
                f'  {way:{width}}{1000 * self.seconds(way):12.1f}'
                f'{self.share(way):10.3f}  {self.notes.get(way, "")}'.rstrip()
            )
        return '\n'.join(lines)

    def row(self) -> str:
        """A line of a table."""
        cells = [
            self.config,
            f'{1000 * self.seconds(WHOLE):.0f}',
            *(
                f'{self.share(way):.2f} {self.notes.get(way, "")}'.strip()
                for way in FAST
            ),
        ]
        return f'| {" | ".join(cells)} |'


def columns() -> str:
    """The head of the table whose lines are :meth:`Ways.row`."""
    names = ['config', 'whole teacher, ms', *FAST]
    return f'| {" | ".join(names)} |\n|{"---|" * len(names)}'


def measure_ways(
    config: Config, settings: Settings, name: str, facts: Mapping[str, Any]
) -> Ways:
    """Time the teachers of a distillation config, in each way.

    Args:
        config: A training config whose model is a ``mmkd.Distiller``.
        settings: How.
        name: Of the config, for the report.
        facts: What is run where, as a timing of the config has them.
    """
    batches = load(config, settings)
    arms = {way: _arm(config, settings, fast) for way, fast in FAST.items()}
    takes = {way: TeacherPass(arm).ready for way, arm in arms.items()}
    first, *_ = arms.values()
    takes[WHOLE] = partial(_whole, first)
    clock = Clock(settings.device)
    taken: dict[str, list[float]] = {way: [] for way in (WHOLE, *FAST)}
    for take in takes.values():
        for index in range(settings.warm_up):
            take(batches[index % len(batches)])()
    dice = random.Random(settings.seed)
    for chosen in rounds(batches, settings):
        for way in dice.sample(list(takes), len(takes)):
            turns = [takes[way](batch) for batch in chosen]
            with clock.span() as span:
                for turn in turns:
                    turn()
            taken[way].append(span() / settings.steps)
    notes = {
        way: note for way, arm in arms.items() if (note := _note(arm, way))
    }
    return Ways(name, taken, notes, facts)


def _arm(
    config: Config, settings: Settings, fast: bool | Mapping[str, Any]
) -> Arm:
    config = copy.deepcopy(config)
    for teacher in config.model.teachers.values():
        teacher.update(fast=fast, cache=0.0)
    with tempfile.TemporaryDirectory() as folder:
        return Arm(built(config, settings, folder), config, settings)


def _whole(arm: Arm, batch: Any) -> Callable[[], None]:
    images, samples = arm.shown(batch)

    def take() -> None:
        with arm.precision, torch.no_grad():
            for teacher in arm.model.teachers.values():
                run_detector(teacher.detector, images, samples)

    return take


def _note(arm: Arm, way: str) -> str:
    """That a teacher fell back, if one did."""
    if FAST[way] is False:
        return ''
    for teacher in arm.model.teachers.values():
        if teacher.fast is not None and teacher.fast.fell_back:
            return '(another way: this one differs)'
    return ''
