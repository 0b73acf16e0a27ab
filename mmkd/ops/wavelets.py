"""Wavelets: a map split into a coarse one and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.ops.numeric import as_float, full_precision
from mmkd.structures.constants import constant

#: From the four cells of a square, row by row, to their sum and the
#: differences of columns, of rows, and of diagonals. It is its own inverse.
HAAR = (
    (0.5, 0.5, 0.5, 0.5),
    (0.5, -0.5, 0.5, -0.5),
    (0.5, 0.5, -0.5, -0.5),
    (0.5, -0.5, -0.5, 0.5),
)


def haar(feature: Tensor, scales: int) -> tuple[Tensor, list[Tensor]]:
    """Haar's wavelet transform of each channel.

    The bands together have the energy of the map. Odd sizes are filled up
    with a row or column of zeros.

    Args:
        feature: Map of one level, (N, C, H, W).
        scales: How often the coarse band is split again.

    Returns:
        The coarse band, (N, C, h, w), and of each scale, the finest first,
        the bands of columns, rows and diagonals, (N, C, 3, h, w).

    Example:
        >>> low, highs = haar(torch.ones(1, 1, 4, 6), scales=2)
        >>> low.tolist(), [tuple(one.shape) for one in highs]
        ([[[[4.0, 2.0]]]], [(1, 1, 3, 2, 3), (1, 1, 3, 1, 2)])
    """
    low, highs = as_float(feature), []
    for _ in range(scales):
        height, width = low.shape[-2:]
        low = F.pad(low, (0, width % 2, 0, height % 2))
        bands = _mix(F.pixel_unshuffle(low, 2).unflatten(1, (-1, 4)))
        low = bands[:, :, 0]
        highs.append(bands[:, :, 1:])
    return low, highs


def unhaar(
    low: Tensor, highs: Sequence[Tensor], size: Sequence[int]
) -> Tensor:
    """The map that :func:`haar` split, (N, C, H, W).

    Args:
        low: The coarse band.
        highs: Bands of each scale, the finest first.
        size: Rows and columns of the map.
    """
    sizes = [tuple(size), *(one.shape[-2:] for one in highs[:-1])]
    for high, (height, width) in zip(reversed(highs), reversed(sizes)):
        cells = _mix(torch.cat([low[:, :, None], high], 2))
        low = F.pixel_shuffle(cells.flatten(1, 2), 2)[..., :height, :width]
    return low


def _mix(cells: Tensor) -> Tensor:
    """From squares to bands and back, (N, C, 4, h, w) → same."""
    with full_precision(cells):
        return torch.einsum('bk,nckhw->ncbhw', constant(HAAR, cells), cells)
