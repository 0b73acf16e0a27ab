"""Mutants of a distillation config: one field of it is wrong in each."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mmengine.config import ConfigDict

#: What mmkd reads of ``model``; the rest is the student's own.
PARTS = ('student', 'teachers', 'terms', 'phases')
#: Keys below which names are the user's own.
FREE = ('teachers', 'terms', 'pairs', 'cfg_options')
#: Keys whose values name parts of a detector.
TAPS = ('tap', 'teacher_tap', 'train', 'freeze', 'inherit')
#: Keys whose values are positions in a list of maps.
LEVELS = ('levels', 'teacher_levels', 'output', 'teacher_output')
#: Of each role, components that play another.
STRANGERS = {
    'loss': ('mmkd.ConvAdapt', 'mmkd.FeatureTerm', 'FPN'),
    'align': ('mmkd.PKDLoss', 'mmkd.FeatureTerm', 'L1Loss'),
    'schedule': ('mmkd.PKDLoss', 'mmkd.ConvAdapt'),
    'weight': ('mmkd.PKDLoss', 'mmkd.ConvAdapt'),
    'term': ('mmkd.PKDLoss', 'mmkd.ConvAdapt', 'RetinaNet'),
}
MISSING = object()


class Mutant(NamedTuple):
    """A config with one wrong field.

    Attributes:
        place: Dotted path of the field in ``model``.
        kind: What was done to it.
        was: Its value.
        now: What stands there instead; ``MISSING`` if nothing does.
        model: The whole ``model``.
    """

    place: str
    kind: str
    was: Any
    now: Any
    model: ConfigDict

    def __str__(self) -> str:
        now = 'nothing' if self.now is MISSING else repr(self.now)
        return f'{self.place}: {self.kind}, {self.was!r:.60} → {now:.60}'

    @property
    def key(self) -> str:
        """Name of the field."""
        return self.place.rpartition('.')[2].partition('[')[0]


def mutants(model: Mapping) -> Iterator[Mutant]:
    """Every mutant of what mmkd reads in the ``model`` of a config."""
    for place, kind, was, now, path, rename in _below(model, (), None):
        other = copy.deepcopy(model)
        _put(other, path, now, rename)
        yield Mutant(
            _dotted(place), kind, was, now if rename is None else rename, other
        )


def _below(node, path, role):
    if isinstance(node, Mapping):
        yield from _of_dict(node, path, role)
    elif isinstance(node, (list, tuple)):
        yield from _of_list(node, path, role)
    else:
        yield from _of_value(node, path, role)


def _of_dict(node, path, role):
    if not path:
        names = [name for name in PARTS if name in node]
    else:
        names = list(node)
    free = bool(path) and path[-1] in FREE
    foreign = _foreign(node)
    if path and not free and not foreign:
        here = (*path, 'nonsense')
        yield here, 'unknown key', MISSING, 1, here, None
    for name in names:
        here = (*path, name)
        value = node[name]
        if not free and not foreign:
            for wrong in misspelt(name):
                if wrong not in node:
                    yield here, 'key misspelt', name, None, here, wrong
        if not foreign:
            yield here, 'dropped', value, MISSING, here, None
        if name == 'type':
            yield from _of_type(value, here, role)
        elif not foreign:
            yield from _others(value, here)
            yield from _below(value, here, _role(path, name))


def _of_type(value, here, role):
    for wrong in misspelt(value):
        yield here, 'type misspelt', value, wrong, here, None
    for wrong in STRANGERS.get(role, ()):
        if wrong != value:
            yield here, 'type of another family', value, wrong, here, None


def _of_list(node, path, role):
    node = list(node)
    if node:
        yield path, 'too short', node, node[:-1], path, None
        yield path, 'too long', node, [*node, node[-1]], path, None
    if len(node) > 1 and node != node[::-1]:
        yield path, 'reversed', node, node[::-1], path, None
    for number, value in enumerate(node):
        here = (*path, number)
        yield from _others(value, here)
        yield from _below(value, here, role)


def _of_value(value, path, role):
    key = next(one for one in reversed(path) if isinstance(one, str))
    if isinstance(value, str):
        kind = 'tap misspelt' if key in TAPS else 'name misspelt'
        for wrong in misspelt(value):
            yield path, kind, value, wrong, path, None
        if key in TAPS:
            wrong = f'{value}.nothing'
            yield path, 'tap of no module', value, wrong, path, None
    elif key in LEVELS and _whole(value):
        for wrong in (99, -1):
            yield path, 'level out of range', value, wrong, path, None
    elif _number(value):
        for wrong in (-abs(value) or -1, 0, math.nan, math.inf):
            if wrong != value:
                yield path, 'number out of range', value, wrong, path, None
        if 'channels' in key or key in ('num_classes', 'dim', 'embed_dims'):
            for wrong in (value - 1, value + 1):
                yield path, 'size by one', value, wrong, path, None


def _others(value, path):
    """Values of other types."""
    if isinstance(value, Mapping):
        wrongs = ('abc', 7, [])
    elif isinstance(value, (list, tuple)):
        wrongs = ('abc', 3.5, {})
    elif isinstance(value, bool):
        wrongs = ('abc', [1])
    elif _number(value):
        wrongs = ('abc', [value], None, {})
    elif isinstance(value, str):
        wrongs = (7, None, {})
    else:
        wrongs = ('abc', 7)
    for wrong in wrongs:
        yield path, 'value of another type', value, wrong, path, None


def misspelt(name: str) -> tuple[str, ...]:
    """A word without a letter in its middle, and with two swapped."""
    start = name.rfind('.') + 1
    word = name[start:]
    if len(word) < 3:
        return (f'{name}x',)
    middle = len(word) // 2
    dropped = word[:middle] + word[middle + 1 :]
    at = next(
        (i for i in range(middle, 0, -1) if word[i] != word[i - 1]), None
    )
    found = [name[:start] + dropped]
    if at is not None:
        swapped = word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
        found.append(name[:start] + swapped)
    return tuple(found)


def _foreign(node: Mapping) -> bool:
    """Whether a dict is a component of mmdet's, which reads it."""
    kind = node.get('type')
    return isinstance(kind, str) and not kind.startswith('mmkd.')


def _role(path, name):
    if (path and path[-1] == 'terms') or name in ('loss', 'align', 'schedule'):
        return 'term' if path and path[-1] == 'terms' else name
    return {'teacher_align': 'align', 'weight': 'weight'}.get(name)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dotted(path) -> str:
    text = ''
    for one in path:
        text += f'[{one}]' if isinstance(one, int) else f'.{one}'
    return text[1:]


def _put(model, path, value, rename) -> None:
    *above, last = path
    node = model
    for one in above:
        if isinstance(node[one], tuple):
            node[one] = list(node[one])  # read again: a ConfigDict copies it
        node = node[one]
    if rename is not None:
        items = list(node.items())
        node.clear()
        for key, one in items:
            node[rename if key == last else key] = one
    elif value is MISSING:
        del node[last]
    else:
        node[last] = copy.deepcopy(value)
