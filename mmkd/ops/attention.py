"""Where and in which channels a map is strong.

Reference:
    Yang et al., "Focal and Global Knowledge Distillation for Detectors",
    CVPR 2022, arXiv:2111.11837, and Zhang and Ma, "Improve Object Detection
    with Feature-based Knowledge Distillation", ICLR 2021, define both alike.
"""

from __future__ import annotations

from torch import Tensor

from mmkd.ops.numeric import as_float


def spatial_attention(feature: Tensor, temperature: float = 0.5) -> Tensor:
    r""":math:`HW \cdot softmax_{hw}(mean_c |F| / temperature)`.

    Args:
        feature: Map of one level, (N, C, H, W).
        temperature: The lower, the sharper.

    Returns:
        Mask with mean 1 over each image, (N, 1, H, W).

    Example:
        >>> import torch
        >>> spatial_attention(torch.ones(1, 3, 2, 2)).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    strength = as_float(feature).abs().mean(1, keepdim=True)
    share = (strength / temperature).flatten(1).softmax(1)
    return share.shape[1] * share.view_as(strength)


def channel_attention(feature: Tensor, temperature: float = 0.5) -> Tensor:
    r""":math:`C \cdot softmax_c(mean_{hw} |F| / temperature)`.

    Args:
        feature: Map of one level, (N, C, H, W).
        temperature: The lower, the sharper.

    Returns:
        Mask with mean 1 over the channels of each image, (N, C, 1, 1).
    """
    strength = as_float(feature).abs().mean((2, 3), keepdim=True)
    return feature.shape[1] * (strength / temperature).softmax(1)
