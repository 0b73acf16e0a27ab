"""Classes: how many a detector's heads tell apart, and which by name.

A detector's class list is only an order of channels. Where a teacher's list
is another one than the student's, the rows of its weights that tell the
classes apart are picked and put into the student's order: what is left is a
detector of the student's classes, whichever of its outputs are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn

#: Parts that tell apart something else than the classes of the data set.
OTHERS = frozenset(
    (
        'rpn_head',
        'semantic_head',
        'semantic_roi_extractor',
        'backbone',
        'neck',
        'terms',
    )
)
#: Settings that are none of a part.
SETTINGS = frozenset(('data_preprocessor', 'train_cfg', 'test_cfg'))
#: Channels of an anchor of YOLOv3 before its classes: a box and objectness.
BEFORE = 5


def head_classes(detector: nn.Module) -> dict[str, int]:
    """Numbers of classes by the path of the head that tells them apart.

    Left out are proposal heads, which tell objects from background, semantic
    ones, which have classes of their own, and losses, which repeat what their
    head says.
    """
    return {
        path: module.num_classes
        for path, module in detector.named_modules()
        if _counts(path.split('.'), module)
    }


def _counts(parts: list[str], module: nn.Module) -> bool:
    return (
        any('head' in part for part in parts)
        and not OTHERS & set(parts)
        and not parts[-1].startswith('loss')
        and type(getattr(module, 'num_classes', None)) is int
    )


def check_num_classes(who: str, student: nn.Module, count: int) -> None:
    """What a term is told must be what a head of the student says.

    Raises:
        ValueError: If it is not.
    """
    known = set(head_classes(student).values())
    if known and count not in known:
        raise ValueError(
            f'{who} is told of {count} classes, the student of {max(known)}. '
            f'Set num_classes={max(known)} in it.'
        )


# Names -----------------------------------------------------------------------


def by_name(
    own: Iterable[str], theirs: Iterable[str]
) -> tuple[str | None, ...]:
    """What a teacher calls each class of a student, None where it lacks it.

    Args:
        own: Names of the student's classes.
        theirs: Names of the teacher's.

    Example:
        >>> by_name(('cat', 'yak'), ('dog', 'cat'))
        ('cat', None)
    """
    known = set(theirs)
    return tuple(name if name in known else None for name in own)


def shared_classes(
    names: Sequence[str | None],
) -> tuple[int, ...] | None:
    """Positions of the student's classes that a teacher has; None if all.

    Args:
        names: As :func:`by_name` returns them.

    Example:
        >>> shared_classes(('cat', None, 'dog'))
        (0, 2)
    """
    found = tuple(
        place for place, name in enumerate(names) if name is not None
    )
    return None if len(found) == len(names) else found


def check_class_names(who: str, names: Any) -> tuple[str | None, ...]:
    """Names as a teacher's ``classes`` gives them.

    Raises:
        ValueError: If they are no list of names, none is there, or one stands
            twice.
    """
    if isinstance(names, str) or not all(
        one is None or isinstance(one, str) for one in names
    ):
        raise ValueError(
            f'{who} takes as classes one name for each class of the student, '
            f"None where the teacher lacks it, for instance ('cat', None, "
            f"'dog'); got {names!r}."
        )
    names = tuple(names)
    told = [one for one in names if one is not None]
    twice = sorted({one for one in told if told.count(one) > 1})
    if twice:
        raise ValueError(
            f'{who} names {twice[0]!r} for several classes of the student. '
            f'One class cannot teach two: write None for all but one.'
        )
    if not told:
        raise ValueError(
            f'{who} shares no class with the student. Leave classes out and '
            f"compare features alone: type='mmkd.FeatureTerm', tap='neck'."
        )
    return names


# Channels --------------------------------------------------------------------


def class_channels(
    size: int,
    width: int,
    count: int,
    kept: Sequence[int],
    by_class: bool = False,
) -> list[int]:
    """Channels of some classes, in their order, and those that are none's.

    Args:
        size: All channels.
        width: Channels of an anchor: one a class; one more for the
            background, the last; or five more, the first, as YOLOv3 has.
        count: Classes that they are of.
        kept: Which classes are wanted.
        by_class: Whether channels of one class lie together and not those of
            one anchor, as a second stage has its boxes.

    Returns:
        Positions of the channels.

    Raises:
        ValueError: If there are so many that their order is not known.

    Example:
        Two anchors of three classes and a background:

        >>> class_channels(8, 4, 3, (2, 0))
        [2, 0, 3, 6, 4, 7]
        >>> class_channels(12, 3, 3, (2,), by_class=True)
        [8, 9, 10, 11]
    """
    more = width - count
    if size % width or more not in (0, 1, BEFORE):
        raise ValueError(
            f'{size} channels are not known to be those of {count} classes '
            f'for each anchor.'
        )
    first = BEFORE if more == BEFORE else 0
    one = [
        *range(first),
        *(first + place for place in kept),
        *range(first + count, width),
    ]
    groups = range(size // width)
    if by_class:
        return [
            place * len(groups) + group for place in one for group in groups
        ]
    return [group * width + place for group in groups for place in one]


def with_classes(model: Mapping, count: int) -> dict:
    """A detector's config whose heads tell apart so many classes.

    Args:
        model: The detector's ``model``.
        count: The number.
    """
    return type(model)(
        {
            key: count
            if key == 'num_classes'
            else one
            if key in OTHERS or key in SETTINGS
            else _inside(one, count)
            for key, one in model.items()
        }
    )


def _inside(value: Any, count: int) -> Any:
    if isinstance(value, Mapping):
        return with_classes(value, count)
    if isinstance(value, (list, tuple)):
        return type(value)(_inside(one, count) for one in value)
    return value


def pick_classes(
    who: str,
    state: Mapping[str, Tensor],
    wider: Mapping[str, Tensor],
    count: int,
    kept: Sequence[int],
) -> dict[str, Tensor]:
    """A detector's weights for some of its classes, in another order.

    Where classes are told apart is seen by a detector of one class more.

    Args:
        who: Whose weights they are, for messages.
        state: All of them.
        wider: Those of a detector of ``count + 1`` classes, of which only
            shapes are looked at.
        count: The detector's classes.
        kept: Which are wanted, in their order.

    Raises:
        ValueError: If a weight depends on the number of classes in a way
            that is not known here.
    """
    picked = {}
    for key, value in state.items():
        shape = wider[key].shape
        for axis, (size, more) in enumerate(zip(value.shape, shape)):
            if size == more:
                continue
            anchors = more - size
            width = size // anchors
            try:
                channels = class_channels(
                    size, width, count, kept, 'roi_head' in key.split('.')
                )
            except ValueError as error:
                raise ValueError(
                    f'{who}: its {key} has {size} numbers for {count} '
                    f'classes, and how they are arranged is not known. Use '
                    f'a teacher with classes in the order of the data set, '
                    f'or leave classes out and compare features alone.'
                ) from error
            index = torch.tensor(channels, device=value.device)
            value = value.index_select(axis, index)
        picked[key] = value
    return picked


def training_classes() -> tuple[str, ...] | None:
    """Class names of the data set that is trained on, None if unknown."""
    hub = MessageHub.get_current_instance()
    meta = hub.get_info('dataset_meta', None) or {}
    classes = meta.get('classes')
    return tuple(classes) if classes else None


def a_few(names: Sequence[str | None]) -> str:
    """The first of some names, for a message.

    Example:
        >>> a_few(('cat', None, 'dog', 'cow'))
        "('cat', None, 'dog', …)"
    """
    more = ', …' if len(names) > 3 else ''
    return f'({", ".join(map(repr, names[:3]))}{more})'
