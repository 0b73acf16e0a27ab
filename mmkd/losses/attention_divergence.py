"""Attention maps of two decoders: how far apart their rows are."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.ops.numeric import as_float


def attention_divergence(
    student: Tensor,
    teacher: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    r"""Mean divergence of the rows of attention maps, by layer.

    .. math:: \sum_l \frac{1}{|R_l|} \sum_{r \in R_l}
              KL(A^T_{lr} \Vert A^S_{lr})

    Each row is brought to a sum of 1 over the columns that count, so that
    what is looked at besides, for instance queries without a partner, has no
    part in it.

    Args:
        student, teacher: Chances, (L, N, R, C) each.
        rows: Whether each row counts, (L, N, R); all if None.
        columns: Whether each column counts, (L, N, C); all if None.
        eps: Added to what counts, so that nothing is divided by 0 where one
            side looks nowhere.

    Returns:
        Scalar, 0 where no row counts, computed in float32.

    Example:
        >>> maps = torch.tensor([[[[0.75, 0.25]]]])
        >>> found = attention_divergence(maps.flip(-1), maps)
        >>> round(found.item(), 4)  # (0.75 - 0.25) log 3
        0.5493
    """
    own, other = (_log_rows(one, columns, eps) for one in (student, teacher))
    chance = other.exp()
    divergence = chance * (own - other).neg()
    if columns is not None:
        divergence = divergence * columns[:, :, None]
    found = divergence.sum(-1)  # L, N, R
    if rows is None:
        return found.mean((1, 2)).sum()
    total = (found * rows).sum((1, 2))
    return (total / rows.sum((1, 2)).clamp(min=1)).sum()


def _log_rows(maps: Tensor, columns: Tensor | None, eps: float) -> Tensor:
    maps = as_float(maps) + eps
    if columns is not None:
        counts = columns[:, :, None]
        total = (maps * counts).sum(-1, keepdim=True)
        total = torch.where(total > 0, total, 1.0)
    else:
        total = maps.sum(-1, keepdim=True)
    return (maps / total).log()
