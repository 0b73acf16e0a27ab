"""How much a term counts: progress of the training in [0, 1] → factor.

Progress is the iteration over the number of iterations, 0 at the first step.
A factor of 0 makes the term idle: neither it nor a teacher that only it needs
is run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from mmkd.checks import check_fraction
from mmkd.registry import SCHEDULES


@SCHEDULES.register_module()
class Constant:
    """The same factor throughout.

    Args:
        factor: The factor.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, progress: float) -> float:
        return self.factor


class Ramp(ABC):
    """Moves between two factors over a part of the training.

    Args:
        begin: Progress at which the movement starts.
        end: Progress at which it is complete.
        start: Factor up to ``begin``.
        stop: Factor from ``end`` on.
    """

    def __init__(
        self,
        begin: float = 0.0,
        end: float = 1.0,
        start: float = 1.0,
        stop: float = 0.0,
    ) -> None:
        who = type(self).__name__
        check_fraction(who, begin=begin, end=end)
        if begin >= end:
            raise ValueError(
                f'{who} moves between begin and end, got begin={begin} and '
                f'end={end}: begin must be the smaller one.'
            )
        self.begin, self.end = begin, end
        self.start, self.stop = start, stop

    def __call__(self, progress: float) -> float:
        position = (progress - self.begin) / (self.end - self.begin)
        position = min(max(position, 0.0), 1.0)
        return self.start + (self.stop - self.start) * self.shape(position)

    @abstractmethod
    def shape(self, position: float) -> float:
        """Share of the way at a position in [0, 1]."""


@SCHEDULES.register_module()
class LinearDecay(Ramp):
    """Falls in a straight line from 1 to 0.

    Example:
        >>> LinearDecay()(0.25)
        0.75
    """

    def shape(self, position: float) -> float:
        return position


@SCHEDULES.register_module()
class CosineDecay(Ramp):
    """Falls from 1 to 0 along half a cosine.

    Example:
        >>> round(CosineDecay()(0.5), 6)
        0.5
    """

    def shape(self, position: float) -> float:
        return (1 - math.cos(math.pi * position)) / 2


@SCHEDULES.register_module()
class LinearWarmup(LinearDecay):
    """Rises in a straight line from 0 to 1 and stays there.

    Args:
        end: Progress at which the full factor is reached.
        start: Factor of the first step.

    Example:
        >>> warmup = LinearWarmup(end=0.1)
        >>> warmup(0.05), warmup(0.5)
        (0.5, 1.0)
    """

    def __init__(self, end: float = 0.1, start: float = 0.0) -> None:
        super().__init__(begin=0.0, end=end, start=start, stop=1.0)


@SCHEDULES.register_module()
class StopAfter:
    """Full factor up to a fraction of the training, then nothing.

    Args:
        fraction: Progress at which the term stops.

    Example:
        >>> stop = StopAfter(0.9)
        >>> stop(0.89), stop(0.9)
        (1.0, 0.0)
    """

    def __init__(self, fraction: float) -> None:
        check_fraction('StopAfter', fraction=fraction)
        self.fraction = fraction

    def __call__(self, progress: float) -> float:
        return 1.0 if progress < self.fraction else 0.0


@SCHEDULES.register_module()
class Between:
    """1 from one point of the training to another, 0 before and after.

    Two of them that meet let one teacher follow another.

    Args:
        begin: Progress from which it is 1.
        end: Progress from which it is 0 again; never where it is 1.

    Raises:
        ValueError: If they are not in [0, 1], or not in this order.

    Example:
        >>> half = Between(begin=0.5)
        >>> half(0.4), half(0.5), half(1.0)
        (0.0, 1.0, 1.0)
    """

    def __init__(self, begin: float = 0.0, end: float = 1.0) -> None:
        check_fraction('Between', begin=begin, end=end)
        if begin >= end:
            raise ValueError(
                f'Between is 1 from begin to end, got begin={begin} and '
                f'end={end}: begin must be the smaller one.'
            )
        self.begin, self.end = begin, end

    def __call__(self, progress: float) -> float:
        ended = progress >= self.end and self.end < 1
        return float(progress >= self.begin and not ended)
