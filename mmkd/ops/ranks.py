"""Ranks that have a gradient: where a value stands among the others."""

from __future__ import annotations

from torch import Tensor

from mmkd.ops.numeric import as_float


def soft_rank(values: Tensor, eps: float = 0.1) -> Tensor:
    r"""How many of a row's values each one exceeds, softly, counted from 1.

    .. math:: r_i = \frac{1}{2} + \sum_j \sigma\left(
        \frac{z_i - z_j}{\epsilon}\right)

    The sum includes j = i, which adds the other half. Values that are far
    apart for :math:`\epsilon` have their rank, 1 for the smallest; equal ones
    share the mean of their ranks, and near ones have something in between.
    The sum of a row's ranks does not depend on it.

    Args:
        values: Any tensor; ranks are those of its last axis, of length K.
        eps: Difference of two values that counts as large.

    Returns:
        Ranks in [1, K], of the same shape, in float32. On the way each pair
        of a row's values takes a number.

    Reference:
        A sum of sigmoids for a rank is Qin et al., "A general approximation
        framework for direct optimization of information retrieval measures",
        Information Retrieval 2010.

    Example:
        >>> import torch
        >>> soft_rank(torch.tensor([10.0, 40.0, 20.0, 20.0]))
        tensor([1.0000, 4.0000, 2.5000, 2.5000])
    """
    values = as_float(values)
    difference = values[..., :, None] - values[..., None, :]
    return 0.5 + (difference / eps).sigmoid().sum(-1)
