"""The page of results: every published experiment, stale ones marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmkd.analysis.report import headline
from mmkd.laboratory.digests import source_digest
from mmkd.laboratory.runs import PACKAGE

FOLDER = Path('docs/results')
PAGE = Path('docs/results.md')

HEAD = """\
# Results

Does a teacher help? Measured on two CPU cores, on small sets and short
trainings, so never to be read beside COCO numbers. What an arm is, how the
numbers are made and how to repeat them stands in
[The laboratory](laboratory.md).

- *Alone* is the student without a teacher, *equal time* the same for as long
  as distillation takes, *sham* is taught from another image of the batch.
- Gains are paired by seed, with 95 % t-intervals. *Gap closed* is the share of
  the distance from alone to teacher.
- Rows marked *stale* were measured with code that has changed since.
"""


def publish(results: Path, name: str) -> dict[str, Path]:
    """Keep an experiment's numbers, and write the page anew.

    Args:
        results: The ``results.json`` of a report.
        name: Name of the experiment.

    Returns:
        The files written, by name.
    """
    found = json.loads(results.read_text(encoding='utf-8'))
    found.pop('cases', None)
    for arm in found['arms']:
        for run in arm['runs']:
            run.pop('diagnostics', None)
    path = FOLDER / f'{name}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + '\n',
        encoding='utf-8',
    )
    PAGE.write_text(page(FOLDER), encoding='utf-8')
    return {path.name: path, PAGE.name: PAGE}


def page(folder: Path) -> str:
    """The page of all experiments whose numbers lie in a folder."""
    parts = [HEAD]
    for path in sorted(folder.glob('*.json')):
        results = json.loads(path.read_text(encoding='utf-8'))
        parts.append(section(results, path.stem))
    return '\n'.join(parts)


def section(results: Mapping[str, Any], name: str) -> str:
    """One experiment.

    Args:
        results: As ``results.json`` has them.
        name: Its name, for the link to the numbers.
    """
    arms = {arm['name']: arm for arm in results['arms']}
    teacher = results['teacher']['metrics']['AP']
    rows = [
        _row(results, arm, stale(results, arm['name']))
        for arm in arms.values()
        if arm['kind'] in ('distilled', 'inherited')
    ]
    alone = next(arm for arm in arms.values() if arm['kind'] == 'alone')
    lines = [
        f'## {results["title"]}',
        '',
        *_wrapped(results.get('note', '')),
        '',
        *_wrapped(headline(results)),
        '',
        f'Teacher {teacher:.1f} AP, student alone {_mean(alone)} AP.',
        '',
        '| method | AP | AP50 | to alone | to equal time | to sham | gap '
        'closed | step time | seeds |',
        '|---|---|---|---|---|---|---|---|---|',
        *rows,
        '',
    ]
    lost = _lost(results)
    if lost:
        lines += [*_wrapped(f'Without numbers: {"; ".join(lost)}.'), '']
    lines += [
        '```bash',
        results['command'],
        '```',
        '',
        f'[Every seed and hash](results/{name}.json). {_versions(results)}',
        '',
    ]
    return '\n'.join(lines)


def stale(results: Mapping[str, Any], arm: str) -> list[str]:
    """Modules that have changed since an arm was measured."""
    known = results.get('sources', {}).get(arm, {})
    return [
        name
        for name, digest in known.items()
        if not (PACKAGE / name).is_file()
        or source_digest(PACKAGE / name) != digest
    ]


def _row(
    results: Mapping[str, Any], arm: Mapping[str, Any], changed: Sequence[str]
) -> str:
    kinds = {one['name']: one['kind'] for one in results['arms']}
    against = {
        kinds[one['against']]: one
        for one in results['comparisons']
        if one['arm'] == arm['name']
    }
    gap = (against.get('alone') or {}).get('gap_closed') or {}
    done = [run for run in arm['runs'] if run['status'] == 'done']
    mark = ' (stale)' if changed else ''
    ratio = arm.get('step_ratio')
    cells = [
        f'{arm["title"]}{mark}',
        _mean(arm),
        _mean(arm, 'AP50'),
        *(_gain(against.get(kind)) for kind in ('alone', 'time', 'sham')),
        '–' if gap.get('mean') is None else f'{gap["mean"]:.0%}',
        '–' if ratio is None else f'×{ratio:.2f}',
        f'{len(done)} of {len(arm["runs"])}',
    ]
    return f'| {" | ".join(cells)} |'


def _mean(arm: Mapping[str, Any], metric: str = 'AP') -> str:
    values = [
        run['metrics'][metric]
        for run in arm['runs']
        if run['metrics'] and run['metrics'].get(metric) is not None
    ]
    return f'{fmean(values):.1f}' if values else '–'


def _gain(one: Mapping[str, Any] | None) -> str:
    if one is None or one.get('mean') is None:
        return '–'
    if one.get('low') is None:
        return f'{one["mean"]:+.1f}'
    return f'{one["mean"]:+.1f} ({one["low"]:+.1f} to {one["high"]:+.1f})'


def _lost(results: Mapping[str, Any]) -> list[str]:
    """Runs without a result, an entry each arm and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for arm in results['arms']:
        for run in arm['runs']:
            if run['status'] != 'done':
                key = arm['title'], run['status']
                found.setdefault(key, []).append(str(run['seed']))
    return [
        f'{title}, seed {", ".join(seeds)} ({status})'
        for (title, status), seeds in found.items()
    ]


def _versions(results: Mapping[str, Any]) -> str:
    known = results.get('versions', {})
    named = [
        f'{name} {known[name]}'
        for name in ('torch', 'mmdet', 'onedl-mmdetection', 'python')
        if name in known
    ]
    return f'{", ".join(named)}; {results.get("machine", "")}.'


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 79)
