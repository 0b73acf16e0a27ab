"""Gradients through steps of training that are only imagined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

#: Parameters by name.
Values = Mapping[str, Tensor]


def virtual_step(values: Values, loss: Tensor, lr: float) -> dict[str, Tensor]:
    r"""Where a step of plain gradient descent would lead.

    .. math:: \theta' = \theta - \eta \, \partial L / \partial \theta

    Nothing is changed, and the graph is kept: :math:`\theta'` depends on all
    that the gradient depends on.

    Args:
        values: Parameters that the loss was computed with.
        loss: Scalar.
        lr: :math:`\eta`.

    Returns:
        New values; the same ones where the loss does not depend on them.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> virtual_step(dict(x=x), x**2, lr=0.5)['x'].item()
        0.0
    """
    slopes = torch.autograd.grad(
        loss, [*values.values()], create_graph=True, allow_unused=True
    )
    return {
        name: value if slope is None else value - lr * slope
        for (name, value), slope in zip(values.items(), slopes)
    }


def meta_gradient(
    knobs: Sequence[Tensor],
    values: Values,
    inner: Callable[[Values], Tensor],
    outer: Callable[[Values], Tensor],
    lr: float,
    inner_steps: int = 2,
) -> tuple[Tensor, list[Tensor]]:
    r"""How what an inner loss is set to changes an outer one.

    The parameters take ``inner_steps`` virtual steps down the inner loss,
    whose settings :math:`\phi` are differentiated, then one down the outer
    loss, and are judged by the outer loss again:

    .. math::

        \theta_{i+1} = \theta_i - \eta \nabla L_{in}(\theta_i; \phi), \quad
        \theta^* = \theta_n - \eta \nabla L_{out}(\theta_n), \quad
        \frac{d L_{out}(\theta^*)}{d \phi}

    Args:
        knobs: :math:`\phi`, leaves that require a gradient.
        values: :math:`\theta_0`, by name; they require a gradient.
        inner: Inner loss of given values; it depends on the knobs.
        outer: Outer loss of given values.
        lr: :math:`\eta` of all virtual steps.
        inner_steps: n.

    Returns:
        The outer loss at the end, without gradient, and its derivative to
        each knob, zero where it does not depend on one.

    Reference:
        Zhang et al., "Adaptive Multi-Teacher Knowledge Distillation with
        Meta-Learning", ICME 2023, arXiv:2306.06634.

    Example:
        One step of 0.5 down w (x - 1)^2 from 0 leads to x = w, one of 0.5
        down (x - 3)^2 from there leads to 3, wherever it began.

        >>> w = torch.tensor(0.2, requires_grad=True)
        >>> x = torch.tensor(0.0, requires_grad=True)
        >>> _, (slope,) = meta_gradient(
        ...     [w],
        ...     dict(x=x),
        ...     inner=lambda at: w * (at['x'] - 1) ** 2,
        ...     outer=lambda at: (at['x'] - 3) ** 2,
        ...     lr=0.5,
        ...     inner_steps=1,
        ... )
        >>> slope.item()
        0.0
    """
    values = dict(values)
    for _ in range(inner_steps):
        values = virtual_step(values, inner(values), lr)
    values = virtual_step(values, outer(values), lr)
    loss = outer(values)
    if not loss.requires_grad:
        return loss, [torch.zeros_like(one) for one in knobs]
    found = torch.autograd.grad(loss, list(knobs), allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(one) if slope is None else slope
        for one, slope in zip(knobs, found)
    ]
