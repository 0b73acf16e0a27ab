"""Precision, scale and nothing: what every loss does to a map first."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_float(feature: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it came so.

    Half precision overflows in sums of squares; float64 stays, so that
    derivatives can be checked numerically.

    Example:
        >>> as_float(torch.zeros(1, dtype=torch.float16)).dtype
        torch.float32
        >>> as_float(torch.zeros(1, dtype=torch.float64)).dtype
        torch.float64
    """
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def full_precision(feature: Tensor) -> AbstractContextManager:
    """Context in which matrix products are not cast to half precision.

    Example:
        >>> x = torch.eye(2)
        >>> with torch.autocast('cpu', torch.bfloat16), full_precision(x):
        ...     (x @ x).dtype
        torch.float32
    """
    device = feature.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def zero_of(feature: Tensor) -> Tensor:
    """Zero with a gradient of zero to a map, whatever the map holds.

    Example:
        >>> x = torch.tensor([float('inf')], requires_grad=True)
        >>> zero_of(x).backward()
        >>> x.grad
        tensor([0.])
    """
    return as_float(feature.flatten()[:0]).sum()


def one_hot(index: Tensor, count: int) -> Tensor:
    """1 at each index, in a last dimension of its own.

    Unlike torch's it never asks the device.

    Example:
        >>> one_hot(torch.tensor([2, 0]), 3).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    known = torch.arange(count, device=index.device)
    return (index[..., None] == known).float()


def standardise(feature: Tensor, eps: float) -> Tensor:
    """Zero mean, unit deviation per channel, (N, C, H, W) → same.

    Args:
        feature: Map of one level, (N, C, H, W).
        eps: Added to the deviation, for channels that are flat.
    """
    feature = as_float(feature)
    std, mean = torch.std_mean(
        feature, dim=(0, 2, 3), correction=0, keepdim=True
    )
    return (feature - mean) / (std + eps)


def zscore(vectors: Tensor, eps: float = 1e-6) -> Tensor:
    """Zero mean, unit deviation along the last axis.

    The mean product of two such vectors is Pearson's correlation.

    Args:
        vectors: Any tensor.
        eps: Length up to which what deviates from the mean counts as none:
            flat vectors, whatever their height, become zeros without a
            gradient.

    Example:
        >>> zscore(torch.tensor([[1.0, 3.0], [7.0, 7.0]])).round(decimals=4)
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """
    vectors = as_float(vectors)
    # From the first value, so that the mean of equal ones is not rounded.
    offset = vectors - vectors[..., :1]
    centred = offset - offset.mean(-1, keepdim=True)
    return unit(centred, -1, eps) * vectors.shape[-1] ** 0.5


def unit(vectors: Tensor, dim: int, eps: float = 1e-6) -> Tensor:
    """Vectors divided by their length; zero where they have no direction.

    Unlike :func:`torch.nn.functional.normalize`, whose derivative at zero is
    1e12, a vector no longer than ``eps`` has no gradient.

    Args:
        vectors: Any tensor.
        dim: Dimension along which vectors lie.
        eps: Length up to which a vector counts as zero.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    vectors = as_float(vectors)
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > eps, length, torch.inf)
