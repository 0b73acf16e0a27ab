"""A temperature that moves between two bounds during the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce
from torch import Tensor

from mmkd.checks import check_name, check_positive

COSINE, LOSS, CONVERGENCE = 'cosine', 'loss', 'convergence'
POLICIES = (COSINE, LOSS, CONVERGENCE)


class Temperature:
    r"""How soft targets are, adjusted a few times in a training.

    .. math:: T = T_{min} + (T_{max} - T_{min}) \, s

    The training is cut into blocks of ``interval``; T is constant in each.
    With ``policy='cosine'`` s falls from 1 in the first block to 0 in the
    last along half a cosine. The others are told the loss, and take its mean
    over the blocks that are over: with ``'loss'``, s is where the last mean
    lies between the least and the largest so far; with ``'convergence'``,
    :math:`s = 1 - e^{-\lambda |dL/dt|}` of the slope between the last two,
    in shares of the first mean and of the training. Until there are two, T is
    ``start``.

    Args:
        policy: ``'cosine'``, ``'loss'`` or ``'convergence'``.
        tmin, tmax: Bounds of T.
        start: T of ``'loss'`` and ``'convergence'`` before they know a slope;
            the middle of the bounds if None.
        interval: Length of a block, as a share of the training.
        rate: The factor :math:`\lambda`.

    Raises:
        ValueError: If the policy is unknown, bounds are out of order, or
            there is a single block, so that T could not move.

    Reference:
        Haase and da Silva, "HPM-KD", arXiv:2512.09886, known second-hand:
        the policies, T = 4 in [2, 6], and an adjustment every 10 epochs.
        There :math:`s = e^{-\lambda |dL/dt|}`, which is low where the loss is
        steep, against the paper's own explanation; one minus it is ours, as
        are the units of the slope and blocks in shares of a training.

    Example:
        >>> temperature = Temperature(interval=0.25)
        >>> [round(temperature(x), 6) for x in (0.0, 0.3, 0.6, 0.99)]
        [6.0, 5.0, 3.0, 2.0]
    """

    def __init__(
        self,
        policy: str = COSINE,
        tmin: float = 2.0,
        tmax: float = 6.0,
        start: float | None = None,
        interval: float = 0.1,
        rate: float = 1.0,
    ) -> None:
        who = 'Temperature'
        check_name(who, 'policy', policy, POLICIES)
        check_positive(who, tmin=tmin, interval=interval, rate=rate)
        if not tmin < tmax:
            raise ValueError(
                f'{who} moves between tmin and tmax, got tmin={tmin} and '
                f'tmax={tmax}. Set tmin below tmax, or give the losses a '
                f'temperature of their own.'
            )
        start = (tmin + tmax) / 2 if start is None else start
        if not tmin <= start <= tmax:
            raise ValueError(
                f'{who} starts between tmin={tmin} and tmax={tmax}, got '
                f'start={start}. Set start to a number between them.'
            )
        if interval > 0.5:
            raise ValueError(
                f'{who} needs two blocks at least to move, got '
                f'interval={interval} of the training. Set it to 0.5 or less.'
            )
        self.policy, self.rate, self.interval = policy, rate, interval
        self.tmin, self.tmax, self.start = tmin, tmax, start
        self.blocks = math.ceil(1 / interval - 1e-9)
        self.means: list[float] = []
        self._block, self._count = 0, 0
        self._total: Tensor | None = None

    @property
    def listens(self) -> bool:
        """Whether it must be told the loss."""
        return self.policy != COSINE

    def __call__(self, progress: float) -> float:
        """T at a position in [0, 1] of the training."""
        if not self.listens:
            share = cosine_share(self._at(progress) / (self.blocks - 1))
        elif len(self.means) < 2:
            return self.start
        elif self.policy == LOSS:
            share = loss_share(self.means)
        else:
            share = convergence_share(self.means, self.rate / self.interval)
        return self.tmin + (self.tmax - self.tmin) * share

    def observe(self, progress: float, loss: Tensor) -> None:
        """Note the loss of a step, before T is asked for.

        Args:
            progress: Position in the training, [0, 1].
            loss: Scalar.
        """
        block = self._at(progress)
        if block != self._block and self._count:
            # Once a block, so that no step waits for the device.
            mean = self._total / self._count
            all_reduce(mean, 'mean')
            if torch.isfinite(mean):
                self.means.append(float(mean))
            self._total, self._count = None, 0
        self._block = block
        loss = loss.detach().float()
        self._total = loss if self._total is None else self._total + loss
        self._count += 1

    def state(self) -> dict[str, Any]:
        """What a stopped training needs to go on."""
        return dict(
            means=list(self.means),
            block=self._block,
            count=self._count,
            total=None if self._total is None else self._total.cpu(),
        )

    def load_state(self, state: dict[str, Any], device: Any = 'cpu') -> None:
        """Take back what :meth:`state` returned."""
        self.means = list(state['means'])
        self._block, self._count = state['block'], state['count']
        total = state['total']
        self._total = None if total is None else total.to(device)

    def _at(self, progress: float) -> int:
        """The block of a position; float error at a border counts as it."""
        return min(int(progress / self.interval + 1e-9), self.blocks - 1)


def cosine_share(position: float) -> float:
    """Falls from 1 to 0 over [0, 1] along half a cosine.

    Example:
        >>> cosine_share(0.0), round(cosine_share(0.5), 6), cosine_share(1.0)
        (1.0, 0.5, 0.0)
    """
    return (1 + math.cos(math.pi * position)) / 2


def loss_share(means: Sequence[float]) -> float:
    """Where the last lies between the least and the largest; 0 if all agree.

    Example:
        >>> loss_share([4.0, 2.0, 3.0])
        0.5
    """
    low, high = min(means), max(means)
    return (means[-1] - low) / (high - low) if high > low else 0.0


def convergence_share(means: Sequence[float], rate: float) -> float:
    """Near 1 where the loss is steep, 0 where it rests.

    Args:
        means: Losses, block by block; the first is the unit.
        rate: Over the change between the last two.

    Example:
        >>> convergence_share([2.0, 1.0, 1.0], rate=5.0)
        0.0
    """
    change = abs(means[-1] - means[-2]) / max(abs(means[0]), 1e-12)
    return 1 - math.exp(-rate * change)
