"""What the operators share: types, chunks, and bilinear sampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the largest temporary tensor of an operator that works in chunks.
BUDGET = 2**23


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring all to one type: float64 where one of them is, else float32."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if double else torch.float32
    return tuple(tensor.to(dtype).contiguous() for tensor in tensors)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Cut ``count`` items of ``size`` elements each into slices that fit."""
    step = max(1, BUDGET // max(1, size))
    for start in range(0, count, step):
        yield slice(start, start + step)


def corners(
    y: Tensor, x: Tensor, height: int, width: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The four pixels around each point, and their bilinear weights.

    A point less than one pixel outside takes the value of the border, one
    further out counts as zero. Weights are differentiable in ``y`` and ``x``.

    Args:
        y: Rows in pixels, any shape.
        x: Columns in pixels, same shape.
        height: Rows of the map.
        width: Columns of the map.

    Yields:
        Index into the flattened map and weight, both of the points' shape.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    # The others, and NaN, move to the first pixel, which gets no weight then.
    y = torch.where(inside, y, 0).clamp(0, height - 1)
    x = torch.where(inside, x, 0).clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    top, left = top.long(), left.long()
    bottom = (top + 1).clamp(max=height - 1)
    beside = (left + 1).clamp(max=width - 1)
    yield top * width + left, (1 - down) * (1 - right) * inside
    yield top * width + beside, (1 - down) * right
    yield bottom * width + left, down * (1 - right)
    yield bottom * width + beside, down * right


def scatter_bilinear(
    grad_input: Tensor, grad: Tensor, plane: Tensor, y: Tensor, x: Tensor
) -> None:
    """Spread gradients over the pixels that a bilinear sample came from.

    Args:
        grad_input: Map to add to, (N, C, H, W).
        grad: Gradient of each sample, any shape.
        plane: Index ``n * C + c`` of the map it was taken from.
        y: Its row in pixels.
        x: Its column in pixels.
    """
    height, width = grad_input.shape[-2:]
    total = grad.new_zeros(grad_input.numel())
    plane = plane * height * width
    for index, weight in corners(y, x, height, width):
        total.index_add_(
            0, (plane + index).flatten(), (grad * weight).flatten()
        )
    grad_input.add_(total.view(grad_input.shape))
