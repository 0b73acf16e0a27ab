"""Windows and grids: a map as groups of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.ops.numeric import as_float


def windows_to_map(
    windows: Tensor, size: tuple[int, int], window: int, shift: int
) -> Tensor:
    """The map that a Swin block cut into windows, its padding dropped.

    Args:
        windows: Image by image, row by row, (N·windows, window², C).
        size: Rows and columns of the map.
        window: Side of a window, cells.
        shift: How far the map was rolled before it was cut.

    Returns:
        (N, C, H, W).

    Reference:
        Liu et al., "Swin Transformer: Hierarchical Vision Transformer using
        Shifted Windows", ICCV 2021, arXiv:2103.14030.

    Example:
        >>> windows_to_map(torch.arange(8.0).view(2, 4, 1), (2, 4), 2, 0)
        tensor([[[[0., 1., 4., 5.],
                  [2., 3., 6., 7.]]]])
    """
    rows, columns = (-(-cells // window) for cells in size)
    cells = windows.unflatten(1, (window, window)).unflatten(
        0, (-1, rows, columns)
    )  # N, rows, columns, window, window, C
    whole = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    whole = whole.roll((shift, shift), (2, 3))
    return whole[:, :, : size[0], : size[1]]


def map_to_windows(feature: Tensor, window: int, shift: int) -> Tensor:
    """Windows of a map, where a Swin block has them; zeros beyond the map.

    A shifted block rolls the map, and keeps what it brought together from
    opposite borders apart by a mask; here these are windows of their own.

    Args:
        feature: (N, C, H, W).
        window: Side of a window, cells.
        shift: How far the block rolls the map.

    Returns:
        (N, windows, window², C).

    Example:
        >>> x = torch.arange(4.0).view(1, 1, 1, 4)
        >>> map_to_windows(x, 2, 0).squeeze().tolist()
        [[0.0, 1.0, 0.0, 0.0], [2.0, 3.0, 0.0, 0.0]]
    """
    before = (window - shift) % window
    after = [-(before + cells) % window for cells in feature.shape[-2:]]
    filled = F.pad(feature, (before, after[1], before, after[0]))
    cut = filled.unflatten(3, (-1, window)).unflatten(2, (-1, window))
    # N, C, rows, window, columns, window
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def grid_tokens(
    feature: Tensor, valid: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The mean of a map in each part of a grid, over the cells that count.

    Args:
        feature: (N, C, H, W).
        valid: 1 at cells that count, 0 at others, (N, 1, H, W).
        grid: Rows and columns, at most; a map that has fewer is its own grid.

    Returns:
        Tokens, (N, T, C), in float32, and whether any cell counts, (N, T).

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0, 5.0, 9.0]]]])
        >>> valid = torch.tensor([[[[1.0, 1, 1, 0]]]])
        >>> grid_tokens(x, valid, (1, 2))[0].flatten().tolist()
        [2.0, 5.0]
    """
    size = [min(cells, most) for cells, most in zip(feature.shape[2:], grid)]
    share = F.adaptive_avg_pool2d(as_float(valid), size)
    kept = torch.where(valid > 0, as_float(feature), 0)
    mean = F.adaptive_avg_pool2d(kept, size) / share.clamp(min=1e-6)
    return mean.flatten(2).transpose(1, 2), share.flatten(1) > 0
