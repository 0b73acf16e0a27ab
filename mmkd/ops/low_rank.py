"""Matrices as products of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.ops.numeric import as_float


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""The nearest product of two thin matrices, by its singular values.

    .. math:: W = U \Sigma V^T
        \approx (U_r \Sigma_r^{1/2}) (\Sigma_r^{1/2} V_r^T)

    No other pair of this rank is nearer, and what is missing has the norm
    :math:`\sqrt{\sum_{i > r} \sigma_i^2}`.

    Args:
        weight: A matrix, (m, n).
        rank: r, from 1 to the smaller of m and n.

    Returns:
        Matrices of (m, r) and (r, n), of the weight's type.

    Raises:
        ValueError: If there is no such rank.

    Reference:
        Eckart and Young, "The approximation of one matrix by another of lower
        rank", Psychometrika 1936.

    Example:
        >>> up, down = truncated(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> torch.allclose(up @ down, torch.diag(torch.tensor([3.0, 2.0, 0])))
        True
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f'truncated takes a rank from 1 to {min(weight.shape)} for a '
            f'matrix of {tuple(weight.shape)}, got {rank}.'
        )
    left, values, right = torch.linalg.svd(
        as_float(weight), full_matrices=False
    )
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return up.to(weight.dtype), down.to(weight.dtype)
