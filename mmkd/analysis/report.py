"""A comparison of trained detectors, told to those who did not run it.

:func:`write_report` turns the results of an experiment (arms × seeds, and the
paired comparisons between the arms) into a folder: a page to read, as HTML and
as Markdown, its pictures, and the numbers as JSON and CSV.
"""

from __future__ import annotations

import csv
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.analysis.changes import diff
from mmkd.analysis.diagrams import draw_pictures
from mmkd.analysis.facts import METHODS, TEACHER, Results, metric_of
from mmkd.analysis.page import (
    NOTHING,
    Card,
    Cell,
    Code,
    Facts,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    as_html,
    as_markdown,
    number,
    present,
    signed,
    span,
)
from mmkd.analysis.pictures import Boxes, grid
from mmkd.analysis.verdict import TONES, judge, outcome, summarise
from mmkd.files import whole

__all__ = ['Case', 'diff', 'draw_cases', 'headline', 'write_report']

#: Metrics in the order of their columns, and what these are called.
METRICS = {
    'AP': 'AP',
    'AP50': 'AP50',
    'AP75': 'AP75',
    'APs': 'AP small',
    'APm': 'AP medium',
    'APl': 'AP large',
}

RANKING_RULE = (
    'Best first. Every method of a group differs from every one of the '
    'groups below (paired t test, p ≤ 0.05 after Holm’s correction over all '
    'pairs); methods of one group are not separated.'
)

STATISTICS = (
    'All comparisons are paired by seed. Interval: Student’s t over the '
    'differences of the seeds, 95 %. Sign test: exact, two-sided. Holm: that '
    'of the t test, corrected for the number of methods that are compared '
    'with the same kind of control. Bootstrap: 95 % interval where seeds and '
    'test images are resampled together.'
)

#: Classes up to which they stand beside each other, not below.
MOST_COLUMNS = 12


def write_report(results: Mapping[str, Any], folder: str | Path) -> dict:
    """Write an experiment's results as a folder that can be read.

    ``cases.png``, if :func:`draw_cases` drew it there before, becomes part of
    the report; ``results['cases']`` may name its rows.

    Args:
        results: What was trained (``arms``, each with ``runs``), compared
            (``comparisons``) and found out about it (``teacher``,
            ``student``, ``data``, ``versions``, …). Metrics are in percent,
            ``gap_closed`` is a share, 1 where the student reaches its
            teacher. A number that does not exist is None or NaN.
        folder: Where to write; made if need be.

    Returns:
        The files, by name: ``report.html``, ``report.md``, ``results.json``,
        ``results.csv``, and of ``gains.png``, ``curves.png``,
        ``diagnostics.png`` and ``cases.png`` those that there are.

    Raises:
        ValueError: If the results lack what every experiment has.
    """
    found = Results(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        'results.json': json.dumps(
            found.facts, indent=1, ensure_ascii=False, allow_nan=False
        )
        + '\n',
    }
    with tempfile.TemporaryDirectory() as narrow:
        pictures = draw_pictures(found, folder, Path(narrow))
        blocks = _blocks(found, pictures)
        files['report.html'] = as_html(found.facts['title'], blocks)
        files['report.md'] = as_markdown(blocks)
    for name, text in files.items():
        with whole(folder / name) as part:
            part.write_text(text, encoding='utf-8')
    _write_csv(found, folder / 'results.csv')
    names = [*files, 'results.csv', *pictures]
    return {name: folder / name for name in names}


def headline(results: Mapping[str, Any]) -> str:
    """The verdict of the report's first line, on all methods together."""
    return summarise(_cards(Results(results)))


@dataclass(frozen=True)
class Case:
    """A test image, and what is in it according to each.

    Args:
        image: A file, or RGB bytes (H, W, 3).
        truth: Boxes, None and labels of the annotation.
        teacher: Boxes, scores and labels that the teacher finds.
        alone: Those of the student alone.
        distilled: Those of the distilled student.
    """

    image: Any
    truth: Boxes
    teacher: Boxes
    alone: Boxes
    distilled: Boxes


def draw_cases(
    cases: Sequence[Case], path: str | Path, classes: Sequence[str] = ()
) -> Path:
    """Draw images below each other, and what each detector finds beside.

    Args:
        cases: The images, for instance those that gain most and least.
        path: The picture to write, ``cases.png`` in a report's folder.
        classes: Names of the classes, by label.

    Returns:
        ``path``.
    """
    columns = {
        'annotation': 'truth',
        'teacher': 'teacher',
        'student alone': 'alone',
        'student distilled': 'distilled',
    }
    rows = [
        (case.image, [getattr(case, name) for name in columns.values()])
        for case in cases
    ]
    return grid(rows, list(columns), path, classes, tile=320)


def _blocks(found: Results, pictures: Mapping[str, Picture]) -> list:
    """The report from top to bottom."""
    sections = [
        _head(found),
        _verdict(found),
        _picture(pictures, 'gains.png'),
        _main_table(found),
        _section('Training', _picture(pictures, 'curves.png')),
        _section('Every seed', _every_seed(found)),
        _section('By class', _by_class(found)),
        _section('Statistics', _statistics(found)),
        _section('Ranking', _ranking(found)),
        _section('Diagnostics', _picture(pictures, 'diagnostics.png')),
        _section('Best and worst cases', _picture(pictures, 'cases.png')),
        _section('Settings', _settings(found)),
    ]
    return [block for section in sections for block in section]


def _section(title: str, blocks: list) -> list:
    return [Heading(title), *blocks] if blocks else []


def _picture(pictures: Mapping[str, Picture], name: str) -> list:
    return [pictures[name]] if name in pictures else []


def _head(found: Results) -> Iterator:
    yield Heading(found.facts['title'], level=1)
    for paragraph in (found.facts.get('note') or '').split('\n\n'):
        if paragraph.strip():
            yield Text(paragraph, 'muted')
    stale = found.facts.get('stale') or []
    if stale:
        reasons = '; '.join(map(str, stale))
        yield Text(
            f'Stale: numbers are older than what made them. {reasons}', 'bad'
        )


def _cards(found: Results) -> list[Card]:
    return [
        judge(
            found.title(name),
            *(found.against(name, kind) for kind in ('time', 'alone', 'sham')),
            metric=found.metric,
            inherits=found.kind(name) == 'inherited',
        )
        for name in found.of_kind(*METHODS)
    ]


def _verdict(found: Results) -> Iterator:
    cards = _cards(found)
    yield Text(summarise(cards), 'lead')
    yield from cards
    absent = found.absent()
    if absent:
        total = len(found.arms) * len(found.seeds)
        verb = 'is' if len(absent) == 1 else 'are'
        yield Text(
            f'{len(absent)} of {total} runs {verb} missing: '
            f'{"; ".join(absent)}.',
            'bad',
        )


def _main_table(found: Results) -> list:
    metrics = _columns(found)
    head = [
        'arm',
        f'{found.metric}, mean ± SD',
        *(METRICS[name] for name in metrics),
        'to alone',
        'to equal time',
        'gap closed',
        'iterations',
        'time of a step',
        'seeds',
    ]
    rows, apart = [], []
    if found.teacher is not None:
        rows.append(_teacher_row(found, metrics))
    for group in found.ordered():
        apart.append(len(rows))
        rows += [_arm_row(found, name, metrics) for name in group]
    strong = _distilled_rows(found, rows)
    note = (
        f'Mean over the seeds that are done. Below a difference stands its '
        f'95 % interval, {found.metric} in points, paired by seed. “Equal '
        f'time” is the student alone, trained for as long as the method '
        f'takes. “Gap closed” is the share of the distance from the student '
        f'alone to its teacher.'
    )
    return [
        Heading('Results'),
        Table(head, [row for _, row in rows], strong, apart),
        Text(note, 'muted'),
    ]


def _distilled_rows(found: Results, rows: Sequence[tuple]) -> list[int]:
    return [
        index
        for index, (name, _) in enumerate(rows)
        if found.kind(name) in METHODS
    ]


def _columns(found: Results) -> list[str]:
    """Metrics beside the main one that at least one arm or teacher has."""
    known = [found.part('teacher').get('metrics')]
    known += [
        run['metrics'] for name in found.arms for run in found.done(name)
    ]
    return [
        name
        for name in METRICS
        if name != found.metric
        and any(metric_of(one, name) is not None for one in known)
    ]


def _teacher_row(found: Results, metrics: Sequence[str]) -> tuple:
    teacher = found.part('teacher')
    scores = [metric_of(teacher['metrics'], name) for name in metrics]
    return TEACHER, [
        _teacher_cell(found),
        number(found.teacher),
        *map(number, scores),
        *[NOTHING] * 6,
    ]


def _teacher_cell(found: Results) -> Cell:
    title = found.part('teacher').get('title') or TEACHER
    return Cell(title, '' if title == TEACHER else TEACHER, 'muted')


def _arm_row(found: Results, name: str, metrics: Sequence[str]) -> tuple:
    arm = found.arms[name]
    scores = list(found.scores(name).values())
    alone = found.against(name, 'alone')
    ratio = arm.get('step_ratio')
    total = len(found.seeds)
    all_done = len(scores) == total
    return name, [
        found.title(name),
        _mean_sd(scores),
        *(number(found.mean(name, one)) for one in metrics),
        _difference_cell(alone),
        _difference_cell(found.against(name, 'time')),
        _gap(alone),
        str(arm.get('iterations') or NOTHING),
        f'{ratio:.2f}×' if present(ratio) else NOTHING,
        str(total)
        if all_done
        else Cell(f'{len(scores)} of {total}', tone='bad'),
    ]


def _mean_sd(scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return number(scores[0]) if scores else NOTHING
    deviation = number(statistics.stdev(scores))
    return f'{number(statistics.fmean(scores))} ± {deviation}'


def _difference_cell(comparison: Mapping[str, Any] | None) -> Cell:
    word = outcome(comparison)
    if word == 'not measured':
        return Cell(NOTHING)
    limits = span(comparison.get('low'), comparison.get('high'))
    return Cell(
        signed(comparison['mean']),
        '' if limits == NOTHING else limits,
        TONES.get(word, ''),
    )


def _gap(comparison: Mapping[str, Any] | None) -> Cell:
    gap = (comparison or {}).get('gap_closed') or {}
    if not present(gap.get('mean')):
        return Cell(NOTHING)
    low, high = (
        100 * gap[end] if present(gap.get(end)) else None
        for end in ('low', 'high')
    )
    limits = (
        ''
        if low is None or high is None
        else (f'{number(low, 0)} to {number(high, 0)}')
    )
    return Cell(f'{number(100 * gap["mean"], 0)} %', limits)


def _every_seed(found: Results) -> list:
    head = ['arm', *(f'seed {seed}' for seed in found.seeds), 'mean', 'SD']
    rows, apart = [], []
    for group in found.ordered():
        apart.append(len(rows))
        for name in group:
            scores = list(found.scores(name).values())
            deviation = statistics.stdev(scores) if len(scores) > 1 else None
            row = [
                found.title(name),
                *(_seed_cell(found, run) for run in found.runs(name)),
                number(found.mean(name, found.metric)),
                number(deviation),
            ]
            rows.append((name, row))
    strong = _distilled_rows(found, rows)
    return [Table(head, [row for _, row in rows], strong, apart)]


def _seed_cell(found: Results, run: Mapping[str, Any]) -> Cell:
    if run['status'] != 'done':
        return Cell(run['status'], tone='bad')
    return Cell(number(metric_of(run.get('metrics'), found.metric)))


def _by_class(found: Results) -> list:
    known = [(found.part('teacher').get('metrics') or {}).get('by_class')]
    known += [
        run['metrics'].get('by_class')
        for name in found.arms
        for run in found.done(name)
    ]
    classes = list(dict.fromkeys(n for one in known for n in one or {}))
    if not classes:
        return []
    head, rows = ['arm', *classes], []
    if found.teacher is not None:
        teacher = found.part('teacher')
        scores = [metric_of(teacher['metrics'], 'AP', one) for one in classes]
        row = [_teacher_cell(found), *map(number, scores)]
        rows.append((TEACHER, row))
    apart = []
    for group in found.ordered():
        apart.append(len(rows))
        for name in group:
            scores = [found.mean(name, 'AP', one) for one in classes]
            rows.append((name, [found.title(name), *map(number, scores)]))
    strong = _distilled_rows(found, rows)
    table = [row for _, row in rows]
    if len(classes) <= MOST_COLUMNS:
        return [Table(head, table, strong, apart)]
    head, *table = (list(column) for column in zip(head, *table))
    head = [
        'class',
        *(one.text if isinstance(one, Cell) else one for one in head[1:]),
    ]
    return [Table(head, table)]


def _statistics(found: Results) -> list:
    if not found.comparisons:
        return []
    draws = {
        (one.get('bootstrap') or {}).get('draws') for one in found.comparisons
    } - {None}
    head = [
        'arm',
        'against',
        'n',
        'mean',
        'SD',
        '95 % interval',
        'won:lost',
        'sign test p',
        't test p',
        'Holm p',
        'bootstrap',
    ]
    by_seed = ['arm', 'against', *(f'seed {seed}' for seed in found.seeds)]
    names = [one['arm'] for one in found.comparisons]
    apart = [i for i, name in enumerate(names) if name not in names[:i]]
    strong = [
        index
        for index, one in enumerate(found.comparisons)
        if found.kind(one['against']) == 'time'
    ]
    text = STATISTICS
    if draws:
        text = text[:-1] + f'; {" or ".join(map(str, sorted(draws)))} draws.'
    if 0 < max(one.get('n') or 0 for one in found.comparisons) < 6:
        text += (
            ' With fewer than 6 seeds the sign test cannot fall below 0.05.'
        )
    rows = [_tests(found, one) for one in found.comparisons]
    seeds = [_differences(found, one) for one in found.comparisons]
    return [
        Table(head, rows, strong, apart, words=(0, 1)),
        Text(text, 'muted'),
        Heading('Differences of each seed', level=3),
        Table(by_seed, seeds, strong, apart, words=(0, 1)),
    ]


def _tests(found: Results, one: Mapping[str, Any]) -> list:
    boot = one.get('bootstrap') or {}
    won, lost = (one.get(end) for end in ('wins', 'losses'))
    return [
        found.title(one['arm']),
        found.title(one['against']),
        NOTHING if one.get('n') is None else str(one['n']),
        Cell(signed(one.get('mean'), 2), tone=TONES.get(outcome(one), '')),
        number(one.get('sd'), 2),
        span(one.get('low'), one.get('high'), 2),
        NOTHING if won is None else f'{won}:{lost}',
        *(_p(one.get(name)) for name in ('sign_p', 'p', 'p_holm')),
        span(boot.get('low'), boot.get('high'), 2),
    ]


def _differences(found: Results, one: Mapping[str, Any]) -> list:
    differences = one.get('differences') or {}
    return [
        found.title(one['arm']),
        found.title(one['against']),
        *(signed(differences.get(str(seed)), 2) for seed in found.seeds),
    ]


def _p(value: float | None) -> str:
    if present(value) and value < 0.001:
        return '< 0.001'
    return number(value, 3)


def _ranking(found: Results) -> list:
    ranking = found.facts.get('ranking') or []
    if len(ranking) > 1 and len(found.seeds) < 2:
        return [Text('One seed separates no methods.', 'muted')]
    items = [
        ', '.join(found.title(name) for name in group)
        + (' (not separated)' if len(group) > 1 else '')
        for group in ranking
    ]
    rule = found.facts.get('ranking_rule') or RANKING_RULE
    return [Items(items), Text(rule, 'muted')] if items else []


def _settings(found: Results) -> list:
    command = found.facts.get('command')
    facts = {
        'Teacher': _detector(found.part('teacher'), found),
        'Student': _detector(found.part('student'), found),
        'Data': _data(found.part('data')),
        'Seeds': ', '.join(map(str, found.seeds)),
        'Training time': _times(found),
        'Machine': found.facts.get('machine') or '',
        'Versions': ', '.join(
            f'{name} {version}'
            for name, version in found.part('versions').items()
        ),
        'Hashes': _hashes(found),
    }
    facts = {name: value for name, value in facts.items() if value}
    return [*([Code(command)] if command else []), Facts(facts)]


def _hashes(found: Results) -> list[str]:
    """Hashes of code and configs, each once; those of data stand with it."""
    lines = []
    for name, value in found.part('hashes').items():
        if value == found.part('data').get('sha256'):
            continue
        parts = value if isinstance(value, Mapping) else {'': value}
        owners: dict[str, list[str]] = {}
        for owner, digest in parts.items():
            owners.setdefault(str(digest), []).append(owner)
        for digest, names in owners.items():
            every = len(owners) == 1
            whose = '' if every else f' of {", ".join(names)}'
            lines.append(f'{name}{whose} {digest}')
    return lines


def _detector(one: Mapping[str, Any], found: Results) -> list[str]:
    score = metric_of(one.get('metrics'), found.metric)
    parts = [
        one.get('title'),
        f'{number(score)} {found.metric}' if score is not None else None,
        f'{_count(one["parameters"])} parameters'
        if present(one.get('parameters'))
        else None,
        f'{one["gflops"]:.3g} GFLOPs' if present(one.get('gflops')) else None,
    ]
    sha = one.get('checkpoint_sha256')
    lines = [
        ', '.join(part for part in parts if part),
        one.get('config'),
        f'checkpoint sha256 {sha}' if sha else None,
    ]
    return [line for line in lines if line]


def _data(data: Mapping[str, Any]) -> list[str]:
    counts = {
        'train_images': 'images to train on',
        'labels': 'of these labelled for the student',
        'test_images': 'images to test on',
        'test_boxes': 'boxes in these',
    }
    parts = [data.get('name')]
    parts += [
        f'{data[name]:,} {words}'
        for name, words in counts.items()
        if data.get(name) is not None
    ]
    lines = [', '.join(part for part in parts if part)]
    lines += [
        f'{name} sha256 {value}'
        for name, value in (data.get('sha256') or {}).items()
    ]
    return [line for line in lines if line]


def _times(found: Results) -> list[str]:
    total, parts = 0.0, []
    for name in found.arms:
        spent = [run.get('seconds') for run in found.runs(name)]
        total += sum(one for one in spent if present(one))
        seconds = [run.get('seconds') for run in found.done(name)]
        seconds = [one for one in seconds if present(one)]
        if seconds:
            parts.append(f'{name} {_duration(statistics.fmean(seconds))}')
    if not parts:
        return []
    return [f'{_duration(total)} in all', f'a run: {", ".join(parts)}']


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    if seconds < 5400:
        return f'{seconds / 60:.1f} min'
    return f'{seconds / 3600:.1f} h'


def _count(value: float) -> str:
    return f'{value / 1e6:.2f} M' if value >= 1e5 else f'{value:,.0f}'


def _write_csv(found: Results, path: Path) -> None:
    """One row for each arm and seed; what does not exist is empty."""
    runs = [(name, run) for name in found.arms for run in found.runs(name)]
    known = [run.get('metrics') or {} for _, run in runs]
    metrics = dict.fromkeys(
        name for one in known for name in one if name != 'by_class'
    )
    classes = dict.fromkeys(
        name for one in known for name in one.get('by_class') or {}
    )
    head = ['arm', 'title', 'kind', 'method', 'seed', 'status', 'reason']
    head += ['iterations', 'step_ratio', 'seconds', *metrics]
    head += [f'AP/{name}' for name in classes]
    with (
        whole(path) as part,
        part.open('w', newline='', encoding='utf-8') as file,
    ):
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(head)
        for name, run in runs:
            arm, scores = found.arms[name], run.get('metrics') or {}
            writer.writerow(
                [
                    *(
                        arm.get(one)
                        for one in ('name', 'title', 'kind', 'method')
                    ),
                    *(run.get(one) for one in ('seed', 'status', 'reason')),
                    *(arm.get(one) for one in ('iterations', 'step_ratio')),
                    run.get('seconds'),
                    *(metric_of(scores, one) for one in metrics),
                    *(metric_of(scores, '', one) for one in classes),
                ]
            )
