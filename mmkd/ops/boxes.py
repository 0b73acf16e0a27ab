"""Boxes: corners, IoU and GIoU, without waiting for the device.

Torchvision's GIoU loss selects by a mask, mmdet's copies a number to the
device, and ``prod``, differentiated, counts zeros on the host: all three wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkd.ops.numeric import as_float


def corners(boxes: Tensor) -> Tensor:
    """Corners of boxes that are given by centre and size.

    Args:
        boxes: Centre x, y, width, height, (…, 4).

    Returns:
        x1 y1 x2 y2, of that shape, float32.

    Example:
        >>> corners(torch.tensor([0.5, 0.5, 0.5, 1.0])).tolist()
        [0.25, 0.0, 0.75, 1.0]
    """
    centre, size = as_float(boxes).split(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def iou(first: Tensor, second: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU of boxes, wherever two shapes can be broadcast.

    With ``[:, :, None]`` and ``[:, None]`` all pairs are compared.

    Args:
        first, second: Corners x1 y1 x2 y2, (…, 4). What is turned inside out
            has no area.
        eps: Least area to divide by.

    Returns:
        In [0, 1], of the common shape without the last axis.

    Example:
        >>> one = torch.tensor([0.0, 0, 2, 2])
        >>> iou(one, torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 2, 1]])).tolist()
        [1.0, 0.5]
    """
    common, union, _ = _areas(first, second)
    return common / union.clamp(min=eps)


def giou(first: Tensor, second: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Generalised IoU of boxes, likewise.

    .. math:: \frac{|A \cap B|}{|A \cup B|}
              - \frac{|H| - |A \cup B|}{|H|}

    H is the smallest box around both. A box that is turned inside out, as
    RTMDet's negative distances may make it, counts as one without extent at
    its first corner.

    Args:
        first, second: Corners x1 y1 x2 y2, (…, 4).
        eps: Least area to divide by.

    Returns:
        In [-1, 1], of the common shape without the last axis.

    Reference:
        Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019,
        arXiv:1902.09630.

    Example:
        >>> one = torch.tensor([0.0, 0, 2, 2])
        >>> giou(one, torch.tensor([[0.0, 0, 2, 2], [2.0, 0, 4, 2]])).tolist()
        [1.0, 0.0]
    """
    common, union, hull = _areas(first, second)
    union, hull = union.clamp(min=eps), hull.clamp(min=eps)
    return common / union - (hull - union) / hull


def giou_error(student: Tensor, teacher: Tensor, axis: int = -1) -> Tensor:
    """One minus the GIoU of boxes, one by one.

    Args:
        student, teacher: Corners x1 y1 x2 y2, as for :func:`giou`.
        axis: Which of the axes holds the four.

    Returns:
        In [0, 2], of the common shape without the axis.
    """
    return 1 - giou(*(one.movedim(axis, -1) for one in (student, teacher)))


def _areas(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the intersection, the union and the smallest box around both."""
    (low, high), (low2, high2) = _upright(first), _upright(second)
    common = _area(torch.maximum(low, low2), torch.minimum(high, high2))
    union = _area(low, high) + _area(low2, high2) - common
    hull = _area(torch.minimum(low, low2), torch.maximum(high, high2))
    return common, union, hull


def _upright(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Corners x1 y1, and x2 y2 that are nowhere below them."""
    low, high = as_float(boxes).chunk(2, -1)
    return low, torch.maximum(low, high)


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height
