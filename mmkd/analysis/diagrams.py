"""The diagrams of a report, each also for a narrow page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.analysis.curves import Interval, Points, bands, intervals
from mmkd.analysis.facts import KINDS, METHODS, TEACHER, Results
from mmkd.analysis.page import Picture, present
from mmkd.analysis.verdict import outcome

__all__ = ['draw_pictures']


#: Diagrams of diagnostics in one picture.
MOST_PANELS = 12


def draw_pictures(
    found: Results, folder: Path, narrow: Path
) -> dict[str, Picture]:
    """Draw each picture for the folder, and again for a narrow page."""
    pictures = {}
    for name, draw in (
        ('gains.png', _draw_gains),
        ('curves.png', _draw_curves),
        ('diagnostics.png', _draw_diagnostics),
    ):
        path = folder / name
        texts = draw(found, path, False)
        if texts is None:
            path.unlink(missing_ok=True)  # of results that had it
            continue
        draw(found, narrow / name, True)
        pictures[name] = Picture(path, *texts, narrow / name)
    rows = found.facts.get('cases', ())
    # An empty list says that the file is of other results.
    if (folder / 'cases.png').is_file() and rows != []:
        named = '; '.join(f'{i}. {row}' for i, row in enumerate(rows, 1))
        pictures['cases.png'] = Picture(
            folder / 'cases.png',
            'Test images with the boxes that each detector finds',
            'The images that gain most from the method, then those that gain '
            f'least. Rows from the top: {named}.'
            if named
            else '',
            diagram=False,
        )
    return pictures


def _draw_gains(
    found: Results, path: Path, narrow: bool
) -> tuple[str, str] | None:
    groups = {}
    for name in found.of_kind(*METHODS):
        rows = {}
        for kind in ('time', 'alone', 'sham'):
            one = found.against(name, kind)
            if outcome(one) != 'not measured':
                values = (one.get('differences') or {}).values()
                rows[KINDS[kind]] = Interval(
                    one['mean'],
                    one.get('low'),
                    one.get('high'),
                    [value for value in values if present(value)],
                )
        if rows:
            groups[found.title(name)] = rows
    if not groups:
        return None
    intervals(
        groups,
        path,
        f'difference in {found.metric}',
        list(KINDS.values()),
        narrow,
    )
    return (
        'Differences of each method to its controls, with intervals',
        'Difference to the student alone in equal time, to the student alone '
        'in as many iterations, and to a student with a sham teacher: mean, '
        '95 % interval, and a dash for each seed.',
    )


def _draw_curves(
    found: Results, path: Path, narrow: bool
) -> tuple[str, str] | None:
    panels = {}
    methods = found.of_kind(*METHODS)
    for name in methods:
        arms = [*found.family(name), *found.of_kind('alone')]
        lines = _lines(found, arms, named=False)
        if any(len(runs[0]) > 1 for runs in lines.values()):
            panels[found.title(name)] = lines
    if not methods:
        lines = _lines(found, list(found.arms), named=True)
        if lines:
            panels[found.facts['title']] = lines
    if not panels:
        return None
    level = found.part('teacher').get('validation')
    if present(level):
        for lines in panels.values():
            lines[TEACHER] = [[(0, level)]]
    names = [*KINDS.values(), TEACHER]
    draw = partial(bands, ylabel=found.metric, names=names)
    draw(panels, path, columns=1 if narrow else None)
    return (
        f'{found.metric} over the iterations, by method',
        'On the validation images, while training. Mean over the seeds that '
        'are done; the band reaches from the lowest seed to the highest.',
    )


def _lines(
    found: Results, arms: Sequence[str], named: bool
) -> dict[str, list[Points]]:
    """Curves of the runs that count, by the arm's role or name."""
    lines = {}
    for name in arms:
        role = KINDS[found.kind(name)]
        label = name if named or role in lines else role
        runs = [
            [(x, y) for x, y in run.get('curve') or () if present(y)]
            for run in found.done(name)
        ]
        runs = [run for run in runs if run]
        if runs and _shared(runs):
            lines[label] = runs
    return lines


def _shared(runs: Sequence[Points]) -> set[int]:
    return set.intersection(*({x for x, _ in run} for run in runs))


def _draw_diagnostics(
    found: Results, path: Path, narrow: bool
) -> tuple[str, str] | None:
    panels: dict[str, dict[str, list[Points]]] = {}
    for name in found.arms:
        for run in found.done(name):
            for what, points in _diagnostics(run).items():
                lines = panels.setdefault(what.replace('_', ' '), {})
                lines.setdefault(name, []).append(points)
    for lines in panels.values():
        for name in [n for n, runs in lines.items() if not _shared(runs)]:
            del lines[name]
    panels = {what: lines for what, lines in panels.items() if lines}
    if not panels:
        return None
    # The methods first: they have the plain dashes.
    ordered = [*found.of_kind(*METHODS), *found.arms]
    drawn = {name for lines in panels.values() for name in lines}
    left_out = len(panels) - MOST_PANELS
    panels = dict(list(panels.items())[:MOST_PANELS])
    bands(
        panels,
        path,
        ylabel='',
        names=[name for name in ordered if name in drawn],
        columns=1 if narrow else None,
        share=False,
        form='{:.3g}',
    )
    more = f' {left_out} more are in results.json.' if left_out > 0 else ''
    return (
        'What was watched during the training',
        f'Mean over the seeds, from lowest to highest as a band.{more}',
    )


def _diagnostics(run: Mapping[str, Any]) -> dict[str, list]:
    found: dict[str, list] = {}
    for entry in run.get('diagnostics') or ():
        for name, value in entry.items():
            if name != 'iteration' and isinstance(value, (int, float)):
                found.setdefault(name, []).append((entry['iteration'], value))
    return found
