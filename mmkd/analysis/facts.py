"""The results of a comparison, and the questions that a report asks them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkd.analysis.page import present
from mmkd.checks import check_name

__all__ = ['CONTROLS', 'KINDS', 'METHODS', 'TEACHER', 'Results', 'metric_of']

#: What every results dict has; the rest may be absent.
REQUIRED = ('title', 'metric', 'seeds', 'arms', 'comparisons')

#: Roles of the arms, in the order of their colours in the diagrams.
KINDS = {
    'distilled': 'distilled',
    'time': 'equal time',
    'alone': 'alone',
    'sham': 'sham',
    'inherited': 'inherited',
}
#: Those that learn from a teacher, and what only they are compared with.
METHODS = ('distilled', 'inherited')
CONTROLS = ('time', 'sham')
TEACHER = 'teacher'


class Results:
    """The dict, and the questions that a report asks it."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        absent = [name for name in REQUIRED if name not in results]
        if absent:
            raise ValueError(
                f'A report needs results with {", ".join(REQUIRED)}; there '
                f'is no {", ".join(absent)}.'
            )
        self.facts = plain(results)
        self.metric = self.facts['metric']
        self.seeds = self.facts['seeds']
        self.arms = {arm['name']: arm for arm in self.facts['arms']}
        for arm in self.arms.values():
            check_name(f'Arm {arm["name"]!r}', 'kind', arm['kind'], KINDS)
        self.comparisons = self.facts['comparisons']

    def part(self, name: str) -> dict[str, Any]:
        """What is known of the teacher, the data, …; may be nothing."""
        return self.facts.get(name) or {}

    @property
    def teacher(self) -> float | None:
        """The teacher's metric."""
        return metric_of(self.part('teacher').get('metrics'), self.metric)

    def title(self, name: str) -> str:
        return self.arms.get(name, {}).get('title') or name

    def kind(self, name: str) -> str:
        return self.arms.get(name, {}).get('kind', '')

    def of_kind(self, *kinds: str) -> list[str]:
        """Names of the arms of these kinds."""
        return [name for name in self.arms if self.kind(name) in kinds]

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One run; status ``'missing'`` if nothing is known of it."""
        for run in self.arms[name]['runs']:
            if run['seed'] == seed:
                return run
        return {'seed': seed, 'status': 'missing'}

    def runs(self, name: str) -> list[dict[str, Any]]:
        """One for each seed, also for those that were never begun."""
        return [self.run(name, seed) for seed in self.seeds]

    def done(self, name: str) -> list[dict[str, Any]]:
        """The runs that count."""
        return [
            run
            for run in self.runs(name)
            if run['status'] == 'done'
            and present(metric_of(run.get('metrics'), self.metric))
        ]

    def scores(self, name: str) -> dict[int, float]:
        """The metric by seed, of the runs that count."""
        if name not in self.arms:
            return {}
        return {
            run['seed']: run['metrics'][self.metric] for run in self.done(name)
        }

    def mean(self, name: str, metric: str, group: str = '') -> float | None:
        """Mean over the seeds that are done; of a class, if it is named."""
        if name not in self.arms:
            return None
        values = [
            metric_of(run['metrics'], metric, group) for run in self.done(name)
        ]
        values = [value for value in values if present(value)]
        return statistics.fmean(values) if values else None

    def seeds_behind(self, name: str) -> str:
        """How many runs an arm's mean is of, in words."""
        count = len(self.scores(name))
        return f'n = {count}' if name in self.arms else ''

    def against(self, name: str, kind: str) -> dict[str, Any] | None:
        """The comparison of an arm with that of a kind, if it was made."""
        for one in self.comparisons:
            if one['arm'] == name and self.kind(one['against']) == kind:
                return one
        return None

    def family(self, name: str) -> list[str]:
        """An arm and the controls that are its own."""
        method = self.arms[name].get('method') or name
        own = [
            one
            for one, arm in self.arms.items()
            if method in (arm.get('method') or '').split(',')
        ]
        own += [
            one['against'] for one in self.comparisons if one['arm'] == name
        ]
        own = [
            one for kind in CONTROLS for one in own if self.kind(one) == kind
        ]
        return list(dict.fromkeys([name, *own]))

    def ordered(self) -> list[list[str]]:
        """The arms in groups: alone, then each method with its controls."""
        groups = [self.of_kind('alone')]
        groups += [self.family(name) for name in self.of_kind(*METHODS)]
        seen: set[str] = set()
        kept = []
        for group in [*groups, list(self.arms)]:
            group = [name for name in group if name not in seen]
            seen.update(group)
            if group:
                kept.append(group)
        return kept

    def absent(self) -> list[str]:
        """Which runs do not count, and why."""
        found = []
        for name in self.arms:
            counted = self.scores(name)
            for run in self.runs(name):
                if run['seed'] not in counted:
                    found.append(f'{name} seed {run["seed"]} {_reason(run)}')
        return found


def _reason(run: Mapping[str, Any]) -> str:
    status = run['status']
    words = {'missing': 'is missing', 'killed': 'was killed'}
    words |= {'stale': 'is stale', 'done': 'has no result'}
    reason = f' ({run["reason"]})' if run.get('reason') else ''
    return f'{words.get(status, status)}{reason}'


def metric_of(
    metrics: Mapping[str, Any] | None, name: str, group: str = ''
) -> float | None:
    """A metric in percent; what COCO gives as -1 does not exist."""
    metrics = metrics or {}
    value = (
        (metrics.get('by_class') or {}).get(group)
        if group
        else metrics.get(name)
    )
    return value if present(value) and value >= 0 else None


def plain(value: Any) -> Any:
    """What JSON can hold; numbers that do not exist are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, 'item'):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, float) and not present(value):
        return None
    return str(value) if isinstance(value, Path) else value
