"""Ascent: move inputs to where an objective is larger, weights untouched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmkd.ops.gradients import SCALE
from mmkd.ops.numeric import as_float

#: How long a step is: of the largest entry of an image's change, of its
#: length, or as the gradient is.
NORMS = ('linf', 'l2', 'raw')


def ascend(
    objective: Callable[[Tensor], Tensor],
    lower: Tensor,
    upper: Tensor,
    steps: int,
    step_size: float,
    norm: str = 'linf',
    ceiling: float | None = None,
) -> Tensor:
    r"""A change of inputs that lets an objective grow.

    .. math:: \delta_{k+1} = clip\left(
        \delta_k + \eta \frac{\nabla J(\delta_k)}{\|\nabla J(\delta_k)\|},
        lower, upper\right), \quad \delta_0 = 0

    Each input has a norm, and so a step, of its own. Where the gradient is
    zero nothing moves. The gradient is asked for to the change alone: no
    weight that the objective reads is given one, and none has to be frozen.

    Args:
        objective: Values of a change, (N, …) → (N,), one an input; that of an
            input depends on its own change.
        lower, upper: What a change may be, around 0, (N, …). An entry where
            both are 0 stays as it is and does not count in the norm.
        steps: How many.
        step_size: The :math:`\eta`: how far one step changes an input.
        norm: ``'linf'``, the entry that changes most changes by
            :math:`\eta`; ``'l2'``, the whole change has that length;
            ``'raw'``, the gradient itself times :math:`\eta`.
        ceiling: A step is no longer than what brings the objective there to
            first order, and none is taken above; None for no end.

    Returns:
        The change, (N, …), without gradient.

    Example:
        >>> room = torch.ones(1, 2)
        >>> peak = torch.tensor([0.5, -4.0])
        >>> def near(change):
        ...     return -(change - peak).square().sum(1)
        >>> ascend(near, -room, room, steps=1, step_size=0.25)
        tensor([[ 0.0312, -0.2500]])
        >>> ascend(near, -room, room, steps=9, step_size=0.5)[:, 1]
        tensor([-1.])
    """
    change = torch.zeros_like(lower)
    for _ in range(steps):
        with torch.enable_grad():
            change.requires_grad_()
            value = objective(change)
            # Maps in half precision would flush small gradients to zero.
            (gradient,) = torch.autograd.grad(
                value, change, torch.full_like(value, SCALE)
            )
        change, value = change.detach(), as_float(value.detach())
        gradient = as_float(gradient) / SCALE * (upper > lower)
        step = step_size * direction(gradient, norm)
        if ceiling is not None:
            step = step * _share(value, gradient, step, ceiling)
        change = torch.minimum(torch.maximum(change + step, lower), upper)
    return change


def direction(gradient: Tensor, norm: str) -> Tensor:
    """A gradient divided by its norm, input by input; zero stays zero.

    Args:
        gradient: (N, …).
        norm: One of :data:`NORMS`.

    Example:
        >>> direction(torch.tensor([[3.0, -4.0], [0.0, 0.0]]), 'l2')
        tensor([[ 0.6000, -0.8000],
                [ 0.0000,  0.0000]])
    """
    if norm == 'raw':
        return gradient
    axes = tuple(range(1, gradient.ndim))
    order = 2 if norm == 'l2' else torch.inf
    length = torch.linalg.vector_norm(gradient, order, axes, keepdim=True)
    return gradient / torch.where(length > 0, length, 1)


def _share(
    value: Tensor, gradient: Tensor, step: Tensor, ceiling: float
) -> Tensor:
    """How much of a step is left to the ceiling, at most all, (N, 1, …)."""
    rise = (gradient * step).flatten(1).sum(1)
    left = (ceiling - value).clamp(min=0)
    share = (left / torch.where(rise > 0, rise, torch.inf)).clamp(max=1)
    return share.view(-1, *[1] * (step.ndim - 1))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode for a block; then each in the mode it was in.

    What a batch looks like then moves no statistic of a BatchNorm, and an
    output is a function of the input alone.

    Example:
        >>> part = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()).train()
        >>> part[1].training = False
        >>> with evaluating(part):
        ...     part[0].training
        False
        >>> part[0].training, part[1].training
        (True, False)
    """
    modes = [
        (one, one.training) for module in modules for one in module.modules()
    ]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for one, training in modes:
            one.training = training
