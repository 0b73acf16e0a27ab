"""Windows that cover a region of a photograph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def windows(
    region: Sequence[int], size: int, overlap: int = 0
) -> list[tuple[int, int, int, int]]:
    """Windows that cover a region and do not leave it, row by row.

    Without overlap the region is divided into equal parts of at most
    ``size``, so that every pixel lies in one window; with overlap, windows
    of ``size`` are spread evenly and share at least ``overlap`` pixels.

    Args:
        region: x1 y1 x2 y2 in whole pixels.
        size: Longest side of a window, pixels.
        overlap: Pixels that neighbours share at least.

    Returns:
        x1 y1 x2 y2 of each window.

    Raises:
        ValueError: If the region is empty, or the overlap not below the size.

    Example:
        >>> windows((0, 0, 30, 10), size=20)
        [(0, 0, 15, 10), (15, 0, 30, 10)]
        >>> windows((0, 0, 30, 10), size=20, overlap=8)
        [(0, 0, 20, 10), (10, 0, 30, 10)]
    """
    x1, y1, x2, y2 = region
    if x2 <= x1 or y2 <= y1:
        raise ValueError(
            f'windows needs a region of some size, got {tuple(region)}.'
        )
    if not 0 <= overlap < size:
        raise ValueError(
            f'windows needs 0 <= overlap < size, got overlap={overlap}, '
            f'size={size}.'
        )
    return [
        (x1 + left, y1 + top, x1 + right, y1 + bottom)
        for top, bottom in _spans(y2 - y1, size, overlap)
        for left, right in _spans(x2 - x1, size, overlap)
    ]


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    if not overlap:
        count = math.ceil(length / size)
        edges = np.linspace(0, length, count + 1).round().astype(int).tolist()
        return list(pairwise(edges))
    size = min(size, length)
    count = math.ceil((length - overlap) / (size - overlap))
    if length == size:
        count = 1
    starts = np.linspace(0, length - size, count).round().astype(int).tolist()
    return [(start, start + size) for start in starts]
