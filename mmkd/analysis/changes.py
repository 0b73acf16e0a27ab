"""What differs between two results of one experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmkd.analysis.facts import Results
from mmkd.analysis.page import (
    NOTHING,
    Cell,
    Facts,
    Table,
    Text,
    as_markdown,
    number,
    present,
    signed,
)

__all__ = ['diff']


def diff(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two results of one experiment, as Markdown.

    Args:
        one: Results, for instance of one machine.
        other: Results of the other.
    """
    first, second = Results(one), Results(other)
    metric = first.metric
    pairs = [('teacher', first.teacher, second.teacher)]
    names = dict.fromkeys([*first.arms, *second.arms])
    pairs += [
        (name, first.mean(name, metric), second.mean(name, metric))
        for name in names
    ]
    rows = [
        [
            name,
            Cell(number(a, 2), first.seeds_behind(name)),
            Cell(number(b, 2), second.seeds_behind(name)),
            signed(_difference(a, b), 2),
            number(_largest(first.scores(name), second.scores(name)), 2),
        ]
        for name, a, b in pairs
    ]
    head = [
        'arm',
        f'{metric}, one',
        f'{metric}, other',
        'difference',
        'largest of a seed',
    ]
    same, changed = _changes(first.facts, second.facts)
    blocks = [Table(head, rows)]
    if changed:
        blocks.append(Text('These differ:'))
        blocks.append(Facts(changed))
    if same:
        blocks.append(Text(f'The same in both: {", ".join(same)}.'))
    return as_markdown(blocks)


def _difference(one: float | None, other: float | None) -> float | None:
    return other - one if present(one) and present(other) else None


def _largest(
    one: Mapping[int, float], other: Mapping[int, float]
) -> float | None:
    shared = [abs(one[seed] - other[seed]) for seed in one if seed in other]
    return max(shared, default=None)


def _changes(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """What is the same in both, and what changed from which to which."""
    first, second = _origin(one), _origin(other)
    same, changed = [], {}
    for name in dict.fromkeys([*first, *second]):
        a, b = (x.get(name) or NOTHING for x in (first, second))
        if a == b:
            same.append(name)
        else:
            changed[name] = f'{a} → {b}'
    return same, changed


def _origin(results: Mapping[str, Any]) -> dict[str, str]:
    """Everything that the numbers may depend on."""
    data, teacher = results.get('data') or {}, results.get('teacher') or {}
    found = {
        'metric': results['metric'],
        'seeds': ', '.join(map(str, results['seeds'])),
        'command': results.get('command'),
        'machine': results.get('machine'),
        'teacher': teacher.get('checkpoint_sha256'),
        'data': data.get('name'),
    }
    hashes = dict(results.get('hashes') or {})
    if hashes.get('data') == data.get('sha256'):
        hashes.pop('data', None)
    for title, part in (
        ('hash of {}', hashes),
        ('data {}', data.get('sha256')),
        ('version of {}', results.get('versions')),
    ):
        for name, value in (part or {}).items():
            if isinstance(value, Mapping):
                for owner, one in value.items():
                    found[f'{title.format(name)} of {owner}'] = str(one)
            else:
                found[title.format(name)] = str(value)
    return found
