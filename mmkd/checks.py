"""Errors of shape and argument, worded once.

Each message says who complains, what was expected, what came, and what to
type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import Tensor


def check_same_shape(who: str, student: Tensor, teacher: Tensor) -> None:
    """Two maps must have one shape, (N, C, H, W).

    Raises:
        ValueError: If they differ; the message names the adapter to add.
    """
    if student.shape == teacher.shape:
        return
    raise ValueError(
        f'{who} compares maps of one shape, got student '
        f'{tuple(student.shape)} and teacher {tuple(teacher.shape)}. '
        f'{_mend(student.shape, teacher.shape)}'
    )


def _mend(student: Sequence[int], teacher: Sequence[int]) -> str:
    if len(student) != len(teacher):
        return 'Tap outputs of one kind on both sides.'
    differs = [a != b for a, b in zip(student, teacher)]
    if differs[0]:
        return 'The batches differ: both must see the same images.'
    channels = (
        f"align=dict(type='mmkd.ConvAdapt', in_channels={student[1]}, "
        f'out_channels={teacher[1]})'
    )
    if not any(differs[2:]):
        return f'Only the channels differ: add {channels} to this term.'
    size = "align=dict(type='mmkd.ResizeAdapt')"
    if not differs[1]:
        return (
            f'Only the size differs: pair levels of one stride with levels= '
            f'and teacher_levels=, or add {size} to this term.'
        )
    return (
        'Channels and size differ: pair levels of one stride with levels= '
        f"and teacher_levels=, then add {channels}; resize='student' in it "
        "brings the student's map to the teacher's size."
    )


def check_channels(who: str, feature: Tensor, expected: int) -> None:
    """A map must have the channels its module was built for.

    Raises:
        ValueError: If it has others; the message names the argument.
    """
    if feature.shape[1] == expected:
        return
    raise ValueError(
        f'{who} was built for {expected} channels, got a map '
        f'{tuple(feature.shape)}. Set its channels to {feature.shape[1]}.'
    )


def check_statistics(who: str, training: bool, maps: Iterable[Tensor]) -> None:
    """BatchNorm needs two cells of each channel while it learns.

    Raises:
        ValueError: If a batch has one.
    """
    for one in maps:
        if training and one.numel() == one.shape[1]:
            raise ValueError(
                f'{who} normalises each channel over the cells of a batch, '
                f'of which {tuple(one.shape)} has one. Show it more images or '
                f'larger ones, or leave the coarsest level out.'
            )


def check_name(who: str, what: str, name: str, known: Iterable[str]) -> None:
    """A name must be one of those known.

    Raises:
        ValueError: If it is not; the message suggests the nearest.
    """
    known = list(known)
    if name in known:
        return
    raise ValueError(f'{who} has no {what} {name!r}. {suggest(name, known)}')


def suggest(name: str, known: Iterable[str]) -> str:
    """The sentence that ends a message about a misspelt name.

    Example:
        >>> suggest('nek', ['backbone', 'neck', 'bbox_head'])
        "Did you mean 'neck'?"
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if near:
        return f'Did you mean {near[0]!r}?'
    shown = ', '.join(repr(one) for one in known[:12])
    more = ', …' if len(known) > 12 else ''
    return f'It has {shown}{more}.' if shown else 'It has none.'


def check_once(who: str, what: str, names: Iterable) -> None:
    """Nothing of a list may stand in it twice.

    Raises:
        ValueError: Names the first that does.
    """
    names = list(names)
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(
                f'{who} names each once in {what}, got {name!r} twice in '
                f'{what}={tuple(names)!r}. Leave one of them out.'
            )


def check_names(who: str, what: str, names: object) -> tuple[str, ...]:
    """Names, one or several, each once.

    Returns:
        All of them.

    Raises:
        ValueError: If it is neither a name nor a list of names, or one
            stands there twice.

    Example:
        >>> check_names('FeatureTerm', 'tap', 'neck')
        ('neck',)
    """
    found = (names,) if isinstance(names, str) else names
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(one, str) for one in found
    ):
        raise ValueError(
            f'{who} takes {what} as a name or a list of names, got '
            f"{what}={names!r}. Write for instance {what}='neck'."
        )
    check_once(who, what, found)
    return tuple(found)


def check_positive(who: str, **values: float) -> None:
    """Settings that must be greater than zero.

    Raises:
        ValueError: Names the first setting that is not.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f'{who} needs {name} > 0, got {name}={value!r}.')


def check_fraction(who: str, **values: float) -> None:
    """Settings that must lie in [0, 1].

    Raises:
        ValueError: Names the first setting that does not.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(
                f'{who} needs {name} between 0 and 1, got {name}={value!r}.'
            )
