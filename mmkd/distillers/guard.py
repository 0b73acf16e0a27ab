"""Notices losses and gradients that are not numbers, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Steps in a row whose gradients a loss scaler may find to overflow. It
#: halves its scale each time: afterwards no scale is to blame.
OVERFLOWS = 40
#: Most names in a message.
NAMED = 6


class Guard:
    """Looks at a step once the device has finished it.

    The values are read at the start of the next step, or before weights are
    saved. By then MMEngine's log has waited for them anyway, so that the
    check costs no synchronisation; and a checkpoint is never written after a
    broken step.

    Attributes:
        witness: Told of what is broken before the error is raised; what it
            returns is added to the message. No copy has it.
        overflows: Steps in a row whose gradients overflowed under a scale.
    """

    def __init__(self) -> None:
        self.witness: Callable[[str], str] | None = None
        self.overflows = 0
        self._iteration = 0
        self._broken: str | None = None
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__, witness=None)

    def forget(self) -> None:
        """The last step is of no more interest."""
        self._losses: tuple[list[str], Tensor] | None = None
        self._gradients: tuple[Sequence[str], Tensor, bool] | None = None

    def watch(
        self,
        losses: Mapping[str, Tensor | Sequence[Tensor]],
        iteration: int,
    ) -> None:
        """Remember the losses of this step; those of a list are its levels."""
        names, values = [], []
        for name, value in losses.items():
            levels = [value] if isinstance(value, Tensor) else list(value)
            for level, one in enumerate(levels):
                names.append(
                    name if len(levels) == 1 else f'{name} of level {level}'
                )
                one = one.detach().float()
                values.append(one.mean() if one.ndim else one)
        self._losses = names, torch.stack(values)
        self._iteration = iteration

    def watch_gradients(
        self, names: Sequence[str], sizes: Tensor, scaled: bool = False
    ) -> None:
        """Remember how large the gradients of this step are.

        Args:
            names: Of the parameters.
            sizes: Largest absolute value of each one's gradient.
            scaled: Whether a loss scaler sees to those that overflow.
        """
        self._gradients = names, sizes, scaled

    def look(self) -> tuple[list[str], list[str]]:
        """What is broken in the step remembered, and forget it.

        Returns:
            Losses with their values, and parameters whose gradients are not
            finite. Gradients are not blamed that a loss scaler sees to.
        """
        losses, gradients = self._losses, self._gradients
        self.forget()
        broken, silent = [], []
        if losses is not None:
            names, values = losses
            broken = [
                f'{name} = {value:g}'
                for name, value, good in zip(
                    names, values.tolist(), torch.isfinite(values).tolist()
                )
                if not good
            ]
        if gradients is not None:
            names, sizes, scaled = gradients
            finite = torch.isfinite(sizes).tolist()
            silent = [name for name, good in zip(names, finite) if not good]
            self.overflows = self.overflows + 1 if silent and scaled else 0
            if scaled and self.overflows <= OVERFLOWS:
                silent = []
        return broken, silent

    def check(self) -> None:
        """Look at the step remembered.

        Raises:
            FloatingPointError: If a loss or a gradient is NaN or infinite;
                the message names it and the iteration.
        """
        if self._broken is not None:
            raise FloatingPointError(self._broken)
        losses, gradients = self.look()
        if losses or gradients:
            self.stop(
                f'{describe(losses, gradients)} at iteration '
                f'{self._iteration + 1}. Training stops before anything is '
                f'saved; the last checkpoint is from before.',
                advice(losses, gradients),
            )

    def stop(self, what: str, then: str) -> None:
        """End the training.

        Raises:
            FloatingPointError: Always, again and again.
        """
        seen = '' if self.witness is None else f' {self.witness(what)}'
        self._broken = f'{what}{seen} {then}'
        raise FloatingPointError(self._broken)


def describe(losses: Sequence[str], gradients: Sequence[str]) -> str:
    """What is broken, in words; the gradients only of finite losses.

    Example:
        >>> describe([], ['neck.conv.weight'])
        'All losses are finite, and the gradient of neck.conv.weight is not'
    """
    if losses:
        return ', '.join(losses)
    more = len(gradients) - NAMED
    few = ', '.join(gradients[:NAMED]) + (f' and {more} more' * (more > 0))
    return f'All losses are finite, and the gradient of {few} is not'


def advice(losses: Sequence[str], gradients: Sequence[str]) -> str:
    """What to try next."""
    broken = losses or gradients
    terms = [one for one in broken if one.startswith(('loss_kd_', 'terms.'))]
    # The levels of a term follow its loss.
    others = [one for one in broken if not _is_level(one) and one not in terms]
    if terms and not others:
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


def _is_level(name: str) -> bool:
    return name.startswith('term ')
