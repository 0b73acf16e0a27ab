"""The page of results: every published experiment, stale ones marked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from mmkd.analysis.facts import METHODS
from mmkd.analysis.report import headline
from mmkd.analysis.statistics import holm, paired_interval, paired_p
from mmkd.analysis.verdict import outcome
from mmkd.configs import read_config
from mmkd.laboratory.arms import UNLABELLED
from mmkd.laboratory.digests import recipe_digest, source_digest
from mmkd.laboratory.runs import PACKAGE
from mmkd.reading import read_json
from mmkd.recipes import (
    DEFAULT,
    DEFAULT_PREDICTED,
    FAMILIES,
    RECIPES,
    Pair,
    inherits,
    look,
    recipe,
)

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
- The *lead of the default* recipe over a method is paired by seed as well.
- What *helps* or *harms*, and what the default is *ahead of* or *behind*, is
  said where it stands after Holm's correction for all methods of the setting.
  Of thirty methods and three seeds, as in the quick setting, little does: its
  intervals, which are not corrected, say more.
- A *family* is what a method compares ([Methods](methods.md)); the best of a
  family is the method that the default leads by least.
- Rows marked *stale* were measured with code, or by a recipe, that has changed
  since.
"""

RECIPE = """\
## The default recipe

What a student learns by that names no method: PKD on the neck, which pushes
the backbone's maps as hard as the detection loss does, and, where both heads
give the same class scores, CWD on these, half as hard. The shares are round
numbers and the same everywhere. `default_predicted`, for images without
labels, also learns from what the teacher detects, and a head of the teacher's
form starts from the teacher's weights. With and without CWD, the teacher's
head to start from, and its detections was tried on the validation split of the
blood cells, the head also on that of the tree crowns ([The
laboratory](laboratory.md#what-pilots-said)). Shares of 2 and 4 for PKD alone
made no clear difference (one seed each). The *gap* is that from the student
alone, in equal time (with 95 % interval) and in equal steps, to the teacher.
"""

#: The default recipe's arms, the one that counts for a setting first.
NAMES = (DEFAULT, f'{DEFAULT_PREDICTED}{UNLABELLED}')
#: Of the default recipe's lead over another method.
LED = {
    'helps': 'ahead of',
    'harms': 'behind',
    'not shown': 'not told apart from',
}
#: What a recipe compares, by its name.
FAMILY = {name: family for family, names in FAMILIES.items() for name in names}
#: Share of the gap that a recipe aims to close.
AIM = 0.7
#: Of the default recipe against the student alone in equal time.
OUTCOMES = {
    'helps': 'It helps',
    'not shown': 'It is not shown to help',
    'harms': 'It harms',
    'not measured': 'Not measured against equal time',
}


def publish(results: Path, name: str) -> dict[str, Path]:
    """Keep an experiment's numbers, and write the page anew.

    Args:
        results: The ``results.json`` of a report.
        name: Name of the experiment.

    Returns:
        The files written, by name.
    """
    found = read_json(results, 'publish', 'results', kind=dict)
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
    found = {
        path.stem: read_json(path, 'page', 'results', kind=dict)
        for path in sorted(folder.glob('*.json'))
    }
    parts = [HEAD, of_default(found.values())]
    parts += [section(results, name) for name, results in found.items()]
    return '\n'.join(parts)


def of_default(experiments: Iterable[Mapping[str, Any]]) -> str:
    """What the default recipe gives in every setting, also where it fails.

    Args:
        experiments: Each as its ``results.json`` has it.
    """
    rows, words, closed = [], {}, {}
    for results in experiments:
        arms = {arm['name']: arm for arm in results['arms']}
        name = next((one for one in NAMES if one in arms), None)
        if name is None:
            continue
        against = _against(results, name)
        control = against.get('time')
        words.setdefault(outcome(control), []).append(results['title'])
        alone = next(arm for arm in arms.values() if arm['kind'] == 'alone')
        longer = _mean(arms[control['against']]) if control else '–'
        mark = ' (stale)' if stale(results, name) else ''
        if (share := _closed(control)) is not None:
            closed.setdefault(share >= AIM, []).append(results['title'])
        cells = [
            f'{results["title"]}{mark}',
            name.removesuffix(UNLABELLED),
            f'{results["teacher"]["metrics"]["AP"]:.1f}',
            _mean(alone),
            longer,
            _mean(arms[name]),
            _gain(control),
            _gap(control, interval=True),
            _gap(against.get('alone')),
            _seeds(arms[name]),
        ]
        rows.append(f'| {" | ".join(cells)} |')
    if not rows:
        return ''
    lines = [
        RECIPE,
        '| setting | recipe | teacher | alone | equal time | taught | gain '
        'over equal time | gap closed | gap closed against alone | seeds |',
        '|---|---|---|---|---|---|---|---|---|---|',
        *rows,
        '',
    ]
    said = {OUTCOMES[word]: titles for word, titles in words.items()}
    for reached, titles in sorted(closed.items(), reverse=True):
        share = f'{AIM:.0%} or more' if reached else f'less than {AIM:.0%}'
        said[f'Gap closed in equal time, {share}'] = titles
    for word, titles in said.items():
        lines += [*_wrapped(f'{word}: {"; ".join(titles)}.'), '']
    return '\n'.join(lines)


def section(results: Mapping[str, Any], name: str) -> str:
    """One experiment.

    Args:
        results: As ``results.json`` has them.
        name: Its name, for the link to the numbers.
    """
    arms = {arm['name']: arm for arm in results['arms']}
    teacher = results['teacher']['metrics']['AP']
    leads = _leads(results)
    rows = [
        _row(results, arm, stale(results, arm['name']), leads)
        for arm in arms.values()
        if arm['kind'] in METHODS
    ]
    lead = 'lead of the default | ' if leads else ''
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
        f'| method | family | AP | AP50 | to alone | to equal time | to sham '
        f'| {lead}gap closed | step time | seeds |',
        f'|---|---|---|---|---|---|---|{"---|" * bool(leads)}---|---|---|',
        *rows,
        '',
    ]
    if leads:
        words = f'{_led(results, leads)} {_over_the_best(results, leads)}'
        lines += [*_wrapped(words), '']
    kept = results.get('verified')
    if kept:
        lines += [*_wrapped(_kept(kept, arms)), '']
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
    """What has changed since an arm was measured: modules, or its recipe."""
    known = results.get('sources', {}).get(arm, {})
    changed = [
        name
        for name, digest in known.items()
        if not (PACKAGE / name).is_file()
        or source_digest(PACKAGE / name) != digest
    ]
    written = results.get('hashes', {}).get('recipe', {}).get(arm)
    if written is not None and written != _written(results, arm):
        changed.append('its recipe')
    return changed


def _written(results: Mapping[str, Any], arm: str) -> str:
    """Digest of what the arm's method writes for this pair today."""
    methods = {one['name']: one['method'] for one in results['arms']}
    method = methods[arm].removesuffix(UNLABELLED)
    if method not in RECIPES:  # a config, whose file is not known here
        return results['hashes']['recipe'][arm]
    configs = (results[side]['config'] for side in ('student', 'teacher'))
    try:
        pair = _pair(*configs)
        terms = recipe(method, pair, results.get('share') or None)
    except (FileNotFoundError, ValueError):  # it does not fit any more
        return ''
    return recipe_digest(terms, inherits(method, pair))


@cache
def _pair(student: str, teacher: str) -> Pair:
    return look(read_config(student), read_config(teacher))


def _leads(results: Mapping[str, Any]) -> dict[str, dict]:
    """How far the default recipe is ahead of each other method, paired by
    seed; empty where there is nothing to compare."""
    scores = {
        arm['name']: {
            run['seed']: run['metrics']['AP']
            for run in arm['runs']
            if run['metrics'] and run['metrics'].get('AP') is not None
        }
        for arm in results['arms']
        if arm['kind'] in METHODS
    }
    default = next((scores.pop(one) for one in NAMES if one in scores), {})
    found = {}
    for name, others in scores.items():
        lead = [
            default[seed] - others[seed] for seed in default if seed in others
        ]
        if lead:
            found[name] = paired_interval(lead).as_dict() | dict(
                p=paired_p(lead)
            )
    adjusted = holm({name: one['p'] for name, one in found.items()})
    return {
        name: dict(one, p_holm=adjusted[name]) for name, one in found.items()
    }


def _led(
    results: Mapping[str, Any], leads: Mapping[str, Mapping[str, Any]]
) -> str:
    """Where the default recipe is ahead, in a sentence."""
    arms = {arm['name']: arm for arm in results['arms']}
    default = next(arms[one]['title'] for one in NAMES if one in arms)
    parts = []
    for word, phrase in LED.items():
        named = [
            arms[name]['title']
            for name, one in leads.items()
            if outcome(one) == word
        ]
        if named:
            parts.append(f'{phrase} {", ".join(named)}')
    return f'{default} is {"; ".join(parts)}.'


def _over_the_best(
    results: Mapping[str, Any], leads: Mapping[str, Mapping[str, Any]]
) -> str:
    """How far the default recipe is ahead of the best of each family; '' if
    no method is of one."""
    best: dict[str, Mapping[str, Any]] = {}
    for arm in results['arms']:
        family = _family(arm)
        if family and arm['name'] in leads:
            best[family] = min(
                best.get(family, arm),
                arm,
                key=lambda one: leads[one['name']]['mean'],
            )
    parts = [
        f'{arm["title"]} ({family}) {_gain(leads[arm["name"]])}'
        for family, arm in best.items()
    ]
    if not parts:
        return ''
    return f'Its lead over the best of each family, in AP: {"; ".join(parts)}.'


def _family(arm: Mapping[str, Any]) -> str:
    """What an arm's method compares; '' for what is made of several."""
    return FAMILY.get((arm['method'] or '').removesuffix(UNLABELLED), '')


def _row(
    results: Mapping[str, Any],
    arm: Mapping[str, Any],
    changed: Sequence[str],
    leads: Mapping[str, Mapping[str, Any]],
) -> str:
    against = _against(results, arm['name'])
    mark = ' (stale)' if changed else ''
    ratio = arm.get('step_ratio')
    cells = [
        f'{arm["title"]}{mark}',
        _family(arm) or '–',
        _mean(arm),
        _mean(arm, 'AP50'),
        *(_gain(against.get(kind)) for kind in ('alone', 'time', 'sham')),
        *([_gain(leads.get(arm['name']))] if leads else []),
        _gap(against.get('alone')),
        '–' if ratio is None else f'×{ratio:.2f}',
        _seeds(arm),
    ]
    return f'| {" | ".join(cells)} |'


def _against(results: Mapping[str, Any], arm: str) -> dict[str, dict]:
    """An arm's comparisons by the kind of the control."""
    kinds = {one['name']: one['kind'] for one in results['arms']}
    return {
        kinds[one['against']]: one
        for one in results['comparisons']
        if one['arm'] == arm
    }


def _closed(one: Mapping[str, Any] | None) -> float | None:
    return ((one or {}).get('gap_closed') or {}).get('mean')


def _gap(one: Mapping[str, Any] | None, interval: bool = False) -> str:
    if _closed(one) is None:
        return '–'
    gap = one['gap_closed']
    text = f'{gap["mean"]:.0%}'
    if interval and gap.get('low') is not None:
        text += f' ({gap["low"]:.0%} to {gap["high"]:.0%})'
    return text


def _seeds(arm: Mapping[str, Any]) -> str:
    done = sum(run['status'] == 'done' for run in arm['runs'])
    return f'{done} of {len(arm["runs"])}'


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


def _kept(kept: Mapping[str, Sequence], arms: Mapping[str, Mapping]) -> str:
    """Which results count for later code, and by what proof."""
    parts = [
        f'{arms[name]["title"]} ({min(one["steps"] for one in found)} of '
        f'{found[0]["of"]} steps)'
        for name, found in kept.items()
        if name in arms
    ]
    return (
        f'The code has changed since; a repeat of the first steps of one seed '
        f'and of its test gave the same numbers to the last bit: '
        f'{", ".join(parts)}. Step times are of the earlier code.'
    )


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
