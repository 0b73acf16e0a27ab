"""Gradients of single losses, measured before the step's own backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Losses are multiplied by this while gradients are measured, so that maps
#: in half precision do not flush them to zero. A power of two rounds nothing.
SCALE = 1024.0


def gradient(loss: Tensor, maps: Sequence[Tensor]) -> Tensor | None:
    """Gradient of a loss to several maps, as one long vector.

    The graph is kept for the step's own backward pass.

    Args:
        loss: A scalar.
        maps: Tensors that require a gradient.

    Returns:
        A float32 vector, zero where the loss does not depend on a map; None
        if it depends on none.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> y = torch.ones(1, requires_grad=True)
        >>> gradient((x**2).sum(), [x, y])
        tensor([2., 4., 0.])
    """
    if not loss.requires_grad:
        return None
    grads = torch.autograd.grad(
        loss,
        maps,
        grad_outputs=torch.full_like(loss, SCALE),
        retain_graph=True,
        allow_unused=True,
    )
    if all(one is None for one in grads):
        return None
    return torch.cat(
        [
            (torch.zeros_like(map_) if one is None else one).flatten().float()
            for one, map_ in zip(grads, maps)
        ]
    ).div_(SCALE)
