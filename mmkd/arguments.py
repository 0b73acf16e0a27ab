"""Arguments of a component, held against what it documents of them.

The type of each comes from the annotations of the constructor, its range from
its name: what ends in ``weight`` is at least 0 wherever it stands. So no
component has to say it, and each goes on refusing what it alone can know.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from mmkd.checks import check_name, check_once

#: Arguments, by their whole name, of which numbers must be positive, and of
#: which they must not be negative.
POSITIVE = re.compile(
    r'(.+_)?(temperature|sigma|std|lr|step_size|channels|dim|heads|topk'
    r'|interval|classes|levels|branches|size|steps|bins|tokens|prompts|grid'
    r'|patch|patches|reduction)'
)
AT_LEAST_ZERO = re.compile(r'(.+_)?(weight|power|decay)|.*warmup(_iters)?')
#: Positions in a pyramid are called levels as well, and begin at 0.
POSITIONS = re.compile(r'(teacher_)?levels')
_NONE = inspect.Parameter.empty
#: Packages whose annotations are not for this.
OTHERS = ('torch', 'mmdet', 'mmcv', 'mmengine')
WORDS = {
    bool: 'True or False',
    int: 'a whole number',
    float: 'a finite number',
    str: 'a text',
    Path: 'a path',
    type(None): 'None',
}


def check_arguments(
    who: str, kind: typing.Callable, arguments: Mapping[str, Any]
) -> None:
    """What a component is given must be what it takes.

    Args:
        who: Named in messages.
        kind: The component's class.
        arguments: By name.

    Raises:
        ValueError: If it has no argument of a name and does not take any; if
            one is of another type than its annotation, names something
            twice, or is a number beyond the range that goes with its name.
    """
    hints = hints_of(kind)
    known = inspect.signature(kind).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in known.values())
    for name, value in arguments.items():
        if not takes_any:
            check_name(who, 'setting', name, known)
        if name not in hints:
            continue
        default = known[name].default if name in known else _NONE
        if not fits(value, hints[name]):
            raise ValueError(
                f'{who} takes {name} as {described(hints[name])}, got '
                f'{name}={value!r}.{_example(name, default)}'
            )
        if _is_list(value) and (
            name == 'levels' or all(isinstance(one, str) for one in value)
        ):
            check_once(who, name, value)
        least = range_of(name)
        if least is not None and not all(map(least[1], _numbers(value))):
            raise ValueError(
                f'{who} needs {name} {least[0]}, got {name}={value!r}.'
                f'{_example(name, default)}'
            )


def checked(kind: type) -> type:
    """Let a class hold what it is given by name against its signature.

    For those that others build: hooks, data sets, transforms.
    """
    plain = kind.__init__

    @functools.wraps(plain)
    def init(self: Any, *given: Any, **named: Any) -> None:
        check_arguments(type(self).__name__, kind, named)
        plain(self, *given, **named)

    kind.__init__ = init
    return kind


@cache
def hints_of(kind: typing.Callable) -> dict[str, Any]:
    """Annotations of a constructor's arguments, by name.

    Nothing where the class is another package's, or names what is only there
    for type checkers.
    """
    if kind.__module__.partition('.')[0] in OTHERS:
        return {}
    call = kind.__init__ if isinstance(kind, type) else kind
    try:
        hints = typing.get_type_hints(call)
    except (NameError, TypeError):
        return {}
    hints.pop('return', None)
    return hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type.

    Numbers must be finite, a float may be written as a whole one, True and
    False are no numbers, and a list will do for any sequence. What an
    annotation of another form means is not known here, and all of it fits.

    Example:
        >>> fits(1, float), fits(1.0, int), fits((1, 2), Sequence[int])
        (True, False, True)
        >>> fits(float('nan'), float), fits('ab', Sequence[str])
        (False, False)
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple and Ellipsis not in inner:
        return (
            _is_list(value)
            and len(value) == len(inner)
            and all(map(fits, value, inner))
        )
    if origin in (Sequence, list, tuple):
        return _is_list(value) and all(fits(one, inner[0]) for one in value)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(one, inner[1])
            for key, one in value.items()
        )
    if hint is float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if isinstance(hint, type):
        return isinstance(value, hint)
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def described(hint: Any) -> str:
    """An annotation in words.

    Example:
        >>> described(int | Sequence[int] | None)
        'a whole number, a list of whole numbers or None'
        >>> described(Mapping[str, Mapping])
        'a dict of dicts'
        >>> described(tuple[float, float])
        'a list of 2 finite numbers'
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        *first, last = (described(one) for one in inner)
        return f'{", ".join(first)} or {last}'
    if origin is typing.Literal:
        return f'one of {", ".join(map(repr, inner))}'
    if origin is tuple and Ellipsis not in inner:
        return f'a list of {len(inner)} {_several(inner[0])}'
    if origin in (Sequence, list, tuple):
        return f'a list of {_several(inner[0])}'
    if hint is Mapping or (origin in (Mapping, dict) and inner[1] is Any):
        return 'a dict'
    if origin in (Mapping, dict):
        return f'a dict of {_several(inner[1])}'
    return WORDS.get(hint) or f'a {getattr(hint, "__name__", hint)}'


def _several(hint: Any) -> str:
    one = described(hint)
    for many in ('list', 'dict'):
        if one.startswith(f'a {many} of '):
            return one.replace(f'a {many}', f'{many}s', 1)
    return f'{one.removeprefix("a ")}s' if one.startswith('a ') else one


def range_of(name: str) -> tuple[str, typing.Callable[[float], bool]] | None:
    """What a number of this name must be, in words and as a test.

    Example:
        >>> range_of('loss_weight')[0], range_of('teacher_channels')[0]
        ('>= 0', '> 0')
        >>> range_of('levels') is None
        True
    """
    if AT_LEAST_ZERO.fullmatch(name):
        return '>= 0', lambda one: one >= 0
    if POSITIVE.fullmatch(name) and not POSITIONS.fullmatch(name):
        return '> 0', lambda one: one > 0
    return None


def _numbers(value: Any) -> list[float]:
    """Numbers in a value, however deep; True and False are none."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return [value]
    if _is_list(value):
        return [number for one in value for number in _numbers(one)]
    return []


def _example(name: str, default: Any) -> str:
    if default in (_NONE, None):
        return ''
    return f' Leave it out for {name}={default!r}.'
