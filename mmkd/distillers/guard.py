"""Stops a training at the first loss that is not a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Guard:
    """Looks at the losses of a step once the device has finished it.

    The values are read at the start of the next step, or before weights are
    saved. By then MMEngine's log has waited for them anyway, so that the
    check costs no synchronisation; and a checkpoint is never written after a
    broken step.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: Tensor | None = None
        self._iteration = 0
        self._broken: str | None = None

    def watch(
        self, losses: Mapping[str, Tensor | Sequence[Tensor]], iteration: int
    ) -> None:
        """Remember the losses of this step."""
        totals = {
            name: value if isinstance(value, Tensor) else sum(value)
            for name, value in losses.items()
        }
        self._names = list(totals)
        self._values = torch.stack(
            [value.detach().float().mean() for value in totals.values()]
        )
        self._iteration = iteration

    def check(self) -> None:
        """Look at the losses remembered.

        Raises:
            FloatingPointError: If one is NaN or infinite; the message names
                it and the iteration.
        """
        if self._broken is not None:
            raise FloatingPointError(self._broken)
        if self._values is None:
            return
        values, self._values = self._values, None
        finite = torch.isfinite(values).tolist()
        if all(finite):
            return
        broken = [
            f'{name} = {value:g}'
            for name, value, good in zip(self._names, values.tolist(), finite)
            if not good
        ]
        self._broken = (
            f'{", ".join(broken)} at iteration {self._iteration + 1}. '
            f'Training stops before anything is saved; the last checkpoint '
            f'is from before. {_advice(broken)}'
        )
        raise FloatingPointError(self._broken)


def _advice(broken: Sequence[str]) -> str:
    terms = [name for name in broken if name.startswith('loss_kd_')]
    if len(terms) == len(broken):
        return (
            'Only distillation terms are affected: lower their loss_weight, '
            "warm them up with schedule=dict(type='mmkd.LinearWarmup'), or "
            'train without --amp.'
        )
    return (
        'Lower the learning rate, clip gradients '
        '(optim_wrapper=dict(clip_grad=dict(max_norm=35, norm_type=2))), or '
        'train without --amp.'
    )
