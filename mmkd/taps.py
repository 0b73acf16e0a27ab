"""Taps: record what named parts of a detector return in a forward pass.

A path names a submodule (``neck``, ``backbone.layer3``) or a method of one
(``bbox_head.get_targets``). It is wrapped for the length of one pass and then
left as it was: no hook or tensor stays behind in the model, so copies of it,
its state dict and its compiled form know nothing of the taps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from mmkd.checks import suggest
from mmkd.structures.nested import apply, leaves


class Record:
    """What the taps of one forward pass returned, call by call.

    Args:
        detector: The detector that runs.
        paths: The taps.

    Attributes:
        size: Height and width of the images the detector was shown, or None
            for the step's own.
    """

    def __init__(self, detector: nn.Module, paths: Iterable[str]) -> None:
        self._detector = detector
        self._away: str | None = None
        self._bring: Callable[[Tensor], Tensor] | None = None
        self.size: tuple[int, int] | None = None
        self._calls: dict[str, list[Call]] = {path: [] for path in paths}

    def add(self, path: str, call: Call) -> None:
        self._calls[path].append(call)

    @property
    def detector(self) -> nn.Module:
        """The detector that ran.

        Raises:
            ValueError: If it stays on a device of its own.
        """
        if self._away is not None:
            raise ValueError(self._away)
        return self._detector

    @detector.setter
    def detector(self, detector: nn.Module) -> None:
        self._detector = detector

    def keep_away(self, why: str) -> None:
        """Give out what the detector returned, and not the detector."""
        self._away = why

    def bring(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put a function of each output in its place; arguments follow when
        they are asked for.
        """
        for path, calls in self._calls.items():
            self._calls[path] = [
                Call(one.args, one.kwargs, apply(function, one.output))
                for one in calls
            ]
        self._bring = function

    @property
    def paths(self) -> tuple[str, ...]:
        """The taps."""
        return tuple(self._calls)

    def has(self, path: str) -> bool:
        return bool(self._calls.get(path))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Record:
        """The same calls with a function of each of their tensors."""
        found = copy.copy(self)
        found._calls = {
            path: [
                Call(
                    apply(function, one.args),
                    apply(function, one.kwargs),
                    apply(function, one.output),
                )
                for one in calls
            ]
            for path, calls in self._calls.items()
        }
        return found

    def convert(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put a function of each recorded tensor in its place."""
        for path, calls in self._calls.items():
            if calls:
                self.outputs(path)  # raises where one was overwritten
        self._calls = self.mapped(function)._calls

    def at(self, path: str) -> Any:
        """Output of a tap; a tuple of outputs if it was called repeatedly.

        Raises:
            RuntimeError: If the pass never called it, or a later layer
                overwrote what it returned.
        """
        outputs = self.outputs(path)
        return outputs[0] if len(outputs) == 1 else Repeated(outputs)

    def outputs(self, path: str) -> list[Any]:
        """Outputs of a tap, call by call; raises as :meth:`at` does."""
        calls = self._called(path)
        if any(call.overwritten() for call in calls):
            raise RuntimeError(
                f'{self._name}: the output of {path!r} was overwritten in '
                f'place by the layer after it (an inplace activation). Tap '
                f'that layer instead, or set inplace=False there.'
            )
        return [call.output for call in calls]

    def learns(self, path: str) -> bool:
        """Whether a gradient can reach what a tap returned, in some call."""
        found = [
            one
            for call in self._called(path)
            for one in leaves(call.output)
            if one.is_floating_point()
        ]
        return not found or any(one.requires_grad for one in found)

    def inputs(self, path: str) -> tuple[tuple, dict]:
        """Arguments of a tap's last call: positional ones, and by name."""
        call = self._called(path)[-1]
        if self._bring is not None:
            return apply(self._bring, (call.args, call.kwargs))
        return call.args, call.kwargs

    @property
    def _name(self) -> str:
        return type(self._detector).__name__

    def _called(self, path: str) -> list[Call]:
        if not self.has(path):
            raise RuntimeError(
                f'{self._name} did not call {path!r} in this forward pass. '
                f'Tap a part that its forward runs.'
            )
        return self._calls[path]


class Repeated(tuple):
    """Outputs of a part that was called repeatedly, call by call."""


class Call:
    """One call of a tapped part."""

    def __init__(self, args: tuple, kwargs: dict, output: Any) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output
        self._versions = [(one, one._version) for one in _tensors(output)]

    def overwritten(self) -> bool:
        return any(one._version != then for one, then in self._versions)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for one in output for tensor in _tensors(one)]


class Finished(Exception):  # noqa: N818 - a signal, not an error
    """Leaves a forward pass once every tap of it has been recorded."""


def resolve(detector: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the name of its method that a tap path stands for.

    Args:
        detector: The detector the path starts from.
        path: Names joined by dots.

    Raises:
        ValueError: If a name is unknown; the message suggests the nearest.
    """
    owner: Any = detector
    names = path.split('.')
    for depth, name in enumerate(names):
        part = _part(owner, name)
        if isinstance(part, nn.Module):
            owner = part
            continue
        if callable(part) and depth == len(names) - 1:
            return owner, name
        where = '.'.join([type(detector).__name__, *names[:depth]])
        known = [child for child, _ in owner.named_children()]
        raise ValueError(
            f'{where} has no submodule {name!r} to tap. {suggest(name, known)}'
        )
    return owner, 'forward'


def in_forward(detector: nn.Module, path: str) -> bool:
    """Whether a tap is reached without computing the detector's losses."""
    return resolve(detector, path)[1].startswith('forward')


def _part(owner: nn.Module, name: str) -> Any:
    child = owner._modules.get(name)
    return child if child is not None else getattr(owner, name, None)


@contextmanager
def recording(
    detector: nn.Module, paths: Iterable[str], stop: bool = False
) -> Iterator[Record]:
    """Record taps while the block runs the detector.

    Args:
        detector: The detector that is run.
        paths: Taps to record.
        stop: Leave the block as soon as the parts of the detector that hold
            the taps have returned: what comes after them is never run.
    """
    paths = list(dict.fromkeys(paths))
    record = Record(detector, paths)
    with ExitStack() as stack:
        for path in paths:
            owner, name = resolve(detector, path)
            stack.enter_context(_wrapped(owner, name, _recorder(record, path)))
        if stop:
            parts = {path.split('.')[0] for path in paths}
            for part in parts:
                owner, name = resolve(detector, part)
                stack.enter_context(
                    _wrapped(owner, name, _stopper(record, part, parts, paths))
                )
        with suppress(Finished):
            yield record


@contextmanager
def counting(detector: nn.Module) -> Iterator[list[int]]:
    """How often a detector's backbone gives each image that it is given.

    TridentNet's heads are shown, while they learn, what each of its branches
    makes of the batch: one whole batch after the other.

    Args:
        detector: The detector that the block runs.

    Returns:
        Of each call of the backbone the number, once the block was left.
    """
    found: list[int] = []

    def count(call: Call) -> None:
        given, made = _tensors(call.args), _tensors(call.output)
        if given and made:
            found.append(max(1, len(made[0]) // max(1, len(given[0]))))

    if not isinstance(getattr(detector, 'backbone', None), nn.Module):
        yield found
        return
    with _wrapped(detector.backbone, 'forward', count):
        yield found


def _recorder(record: Record, path: str) -> Callable[[Call], None]:
    return lambda call: record.add(path, call)


def _stopper(
    record: Record, part: str, parts: set[str], paths: Sequence[str]
) -> Callable[[Call], None]:
    def leave(_: Call) -> None:
        if all(record.has(path) for path in paths if _inside(path, part)):
            parts.discard(part)
        if not parts:
            raise Finished

    return leave


def _inside(path: str, part: str) -> bool:
    return path == part or path.startswith(f'{part}.')


@contextmanager
def _wrapped(
    owner: nn.Module, name: str, listen: Callable[[Call], None]
) -> Iterator[None]:
    # The method and not a forward hook: mmdet calls some heads by
    # ``head.forward(x)``, which hooks never see.
    own = owner.__dict__.get(name)
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        output = method(*args, **kwargs)
        listen(Call(args, kwargs, output))
        return output

    owner.__dict__[name] = call
    try:
        yield
    finally:
        if own is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = own


def maps_of(
    value: Any, who: str, output: int | None = None
) -> tuple[Tensor, ...]:
    """Bring what a tap returned into one form: a tuple of maps.

    Args:
        value: A map, a sequence of maps, a sequence of such sequences (a
            head's outputs), or a tuple of any of these (a part called once a
            level).
        who: Named in the message.
        output: Which of a head's outputs, for instance 0 for class scores.

    Raises:
        ValueError: If what is left is not a tuple of tensors.
    """
    if isinstance(value, Repeated):
        return tuple(
            one for each in value for one in maps_of(each, who, output)
        )
    if output is not None:
        if not isinstance(value, (list, tuple)) or output >= len(value):
            size = len(value) if isinstance(value, (list, tuple)) else 1
            raise ValueError(
                f'{who} asks for output={output} of a tap that returns '
                f'{size}. Use an output below {size}, or none.'
            )
        value = value[output]
    maps = (value,) if isinstance(value, Tensor) else value
    if isinstance(maps, (list, tuple)) and all(
        isinstance(one, Tensor) for one in maps
    ):
        return tuple(maps)
    kinds = (
        ', '.join(type(one).__name__ for one in maps)
        if isinstance(maps, (list, tuple))
        else type(maps).__name__
    )
    raise ValueError(
        f'{who} needs a tap that returns feature maps, got {kinds}. A head '
        f'returns several lists of maps: choose one with output=0.'
    )


def pick_levels(
    maps: tuple[Tensor, ...], levels: Sequence[int] | None, who: str
) -> tuple[Tensor, ...]:
    """Some of a tap's maps.

    Args:
        maps: All of them.
        levels: Which, 0 is the finest; all if None.
        who: Named in the message.

    Raises:
        ValueError: If there are not so many.
    """
    if levels is None:
        return maps
    beyond = [level for level in levels if not 0 <= level < len(maps)]
    if beyond:
        raise ValueError(
            f'{who} returns {len(maps)} maps, levels 0 to '
            f'{len(maps) - 1}; levels={tuple(levels)} asks for {beyond[0]}. '
            f'Choose among those that are there with levels=, for a teacher '
            f'with teacher_levels=.'
        )
    return tuple(maps[level] for level in levels)


def crop(
    maps: Sequence[Tensor],
    shown: tuple[int, int] | None,
    size: Sequence[int],
) -> tuple[Tensor, ...]:
    """Drop the cells over a border that only the teacher was shown.

    Args:
        maps: A teacher's, (…, H, W) each.
        shown: Height and width of the images it was shown; of the size below
            if None.
        size: Of the images that the student sees.

    Example:
        >>> import torch
        >>> crop((torch.zeros(1, 1, 4, 4),), (64, 64), (64, 48))[0].shape
        torch.Size([1, 1, 4, 3])
    """
    if shown is None or tuple(shown) == tuple(size):
        return tuple(maps)
    return tuple(
        one[
            ...,
            : math.ceil(one.shape[-2] * size[0] / shown[0]),
            : math.ceil(one.shape[-1] * size[1] / shown[1]),
        ]
        for one in maps
    )
