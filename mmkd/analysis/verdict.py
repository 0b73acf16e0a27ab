"""What a comparison of seeds shows, in words that do not exceed it.

A method is judged against the student alone that was trained for the same
time, because a student that merely trains longer improves as well. It *helps*
(or *harms*) if the 95 % interval of the paired differences excludes 0, after
Holm's correction where several are compared. Else nothing is *shown*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.analysis.page import Card, number, present, signed, span

__all__ = ['judge', 'outcome', 'summarise']

#: Below it a corrected p-value counts.
LEVEL = 0.05

TONES = {'helps': 'good', 'harms': 'bad'}

INHERITS = (
    'It starts from weights of its teacher, which the student alone does not.'
)

PHRASES = {
    'helps': ('helps', 'help'),
    'not shown': ('is not shown to help', 'are not shown to help'),
    'harms': ('harms', 'harm'),
    'not measured': ('was not measured', 'were not measured'),
}


def outcome(comparison: Mapping[str, Any] | None) -> str:
    """``'helps'``, ``'harms'``, ``'not shown'`` or ``'not measured'``.

    Args:
        comparison: Mean and interval of the differences, and Holm's p-value
            if there is one.

    Example:
        >>> outcome({'mean': 3.0, 'low': 1.0, 'high': 5.0})
        'helps'
        >>> outcome({'mean': 3.0, 'low': 1.0, 'high': 5.0, 'p_holm': 0.07})
        'not shown'
    """
    if comparison is None or not present(comparison.get('mean')):
        return 'not measured'
    side = _side(comparison)
    if not side or not _survives(comparison):
        return 'not shown'
    return 'helps' if side > 0 else 'harms'


def judge(
    title: str,
    control: Mapping[str, Any] | None,
    alone: Mapping[str, Any] | None = None,
    sham: Mapping[str, Any] | None = None,
    metric: str = 'AP',
    inherits: bool = False,
) -> Card:
    """The verdict on one method.

    Args:
        title: Name of the method.
        control: Its comparison with the student alone in equal time.
        alone: Its comparison with the student alone in equal iterations.
        sham: Its comparison with a teacher that knows nothing of the image.
        metric: What is compared.
        inherits: Whether it starts from weights of its teacher.
    """
    word = outcome(control)
    sentences = [
        _against_control(control, metric),
        _against_alone(word, alone, metric),
        _against_sham(word, sham, metric),
        INHERITS * inherits,
    ]
    return Card(
        title=title,
        word=word,
        figure=_figure(control, metric),
        text=' '.join(one for one in sentences if one),
        tone=TONES.get(word, ''),
    )


def summarise(cards: Sequence[Card]) -> str:
    """One sentence about all methods."""
    if not cards:
        return 'No method was compared.'
    parts = []
    for word, phrases in PHRASES.items():
        titles = [card.title for card in cards if card.word == word]
        if titles:
            parts.append(f'{_listed(titles)} {phrases[len(titles) > 1]}')
    if len(cards) == 1 and cards[0].word != 'not measured':
        parts[0] += f': {cards[0].figure}'
    each = ' each' * (len(cards) > 1)
    return (
        f'{"; ".join(parts)}{"," * bool(each)}{each} against the student '
        f'alone in equal time.'
    )


def _side(comparison: Mapping[str, Any]) -> int:
    """1 or -1 if the interval lies on one side of 0, else 0."""
    low, high = comparison.get('low'), comparison.get('high')
    if not (present(low) and present(high)):
        return 0
    return (low > 0) - (high < 0)


def _survives(comparison: Mapping[str, Any]) -> bool:
    p = comparison.get('p_holm')
    return not present(p) or p < LEVEL


def _figure(comparison: Mapping[str, Any] | None, metric: str) -> str:
    mean = comparison.get('mean') if comparison else None
    return f'{signed(mean)} {metric}'


def _interval(comparison: Mapping[str, Any]) -> str:
    return span(comparison.get('low'), comparison.get('high'))


def _against_control(control: Mapping[str, Any] | None, metric: str) -> str:
    if outcome(control) == 'not measured':
        return (
            'There is no pair of finished runs to compare with the student '
            'alone in equal time.'
        )
    start = 'against the student alone in equal time'
    count = control.get('n')
    if not (present(control.get('low')) and present(control.get('high'))):
        return f'{start}, in one seed, which gives no interval.'
    seeds = f', {count} seeds' if count else ''
    start = f'{start} (95 % interval {_interval(control)}{seeds})'
    if not _side(control):
        return f'{start}; the interval includes 0.'
    if _survives(control):
        return f'{start}; the interval excludes 0.'
    return (
        f'{start}; the interval excludes 0, but no longer after correcting '
        f'for several comparisons (Holm, p = {number(control["p_holm"], 3)}).'
    )


def _against_alone(
    word: str, alone: Mapping[str, Any] | None, metric: str
) -> str:
    if word == 'helps' or outcome(alone) != 'helps':
        return ''
    return (
        f'It gains {_figure(alone, metric)} ({_interval(alone)}) on the '
        f'student alone in as many iterations, but takes longer for them.'
    )


def _against_sham(
    word: str, sham: Mapping[str, Any] | None, metric: str
) -> str:
    against = outcome(sham)
    if against == 'not measured':
        return 'It was not compared with a sham teacher.'
    gain = f'{_figure(sham, metric)}, {_interval(sham)}'
    if against == 'helps':
        also = 'also ' * (word == 'helps')
        return f'It {also}beats its sham teacher ({gain}).'
    doubt = (
        ', so the gain may not come from what the teacher knows'
        if word == 'helps'
        else ''
    )
    if against == 'harms':
        return f'Its sham teacher does better ({gain}){doubt}.'
    but = 'But it' if word == 'helps' else 'It'
    return f'{but} is not shown to beat its sham teacher ({gain}){doubt}.'


def _listed(titles: Sequence[str]) -> str:
    if len(titles) == 1:
        return titles[0]
    return f'{", ".join(titles[:-1])} and {titles[-1]}'
