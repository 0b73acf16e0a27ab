"""Maps generated from what is left of another: what is hidden, and by what."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def hide_strongest(strength: Tensor, mask_ratio: float) -> Tensor:
    """Zero at the strongest entries of each image and one elsewhere.

    Exactly ``round(mask_ratio * entries)`` are hidden; of equal ones, which
    is left open.

    Args:
        strength: Anything that grows with the attention over space or
            channels, (N, ...). The mean of absolute values does; the softmax
            that often follows would only make equals of what it rounds to 0.
        mask_ratio: Share of an image's entries that are hidden.

    Returns:
        Mask without gradient, of the same shape.

    Example:
        >>> hide_strongest(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 0.5)
        tensor([[1., 0., 0., 1.]])
    """
    flat = strength.detach().flatten(1)
    hidden = flat.topk(round(mask_ratio * flat.shape[1]), dim=1).indices
    return torch.ones_like(flat).scatter(1, hidden, 0.0).view_as(strength)


def generation_block(channels: int) -> nn.Sequential:
    """What generates the teacher's map: 3x3 convolution, ReLU, another."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
    )
