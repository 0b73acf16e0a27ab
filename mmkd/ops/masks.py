"""Boxes as weights of the cells of a map.

All masks are (N, 1, h, w) in float32 and made without a loop over boxes and
without waiting for the device. A box is scaled by the size of the *padded*
batch, which is what the whole map covers; scaled by its own image it would be
stretched wherever an image is smaller than its batch.

Cells of the padded border and cells that an ignored box touches are neither
foreground nor background, unless ``keep_padding`` or ``keep_ignored`` is
given. The authors of the methods built on these masks know neither notion:
both True, on images without padding, gives their masks.

A box without area, or with no part inside the padded batch, marks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.ops.numeric import as_float
from mmkd.structures import GroundTruth

#: Cells drawn at once, over all boxes: 16 MB in float32.
CHUNK = 2**22


def require_ground_truth(
    who: str, gt: GroundTruth | None, feature: Tensor
) -> GroundTruth:
    """The ground truth, if it is there and fits the batch.

    Raises:
        ValueError: If it is missing or has another number of images.
    """
    if gt is None:
        raise ValueError(
            f'{who} weighs cells by the boxes of the batch, got gt=None. '
            f'Call it as loss(student, teacher, gt) with a GroundTruth.'
        )
    if gt.num_images != len(feature):
        raise ValueError(
            f'{who} needs the ground truth of the images it sees: the map '
            f'{tuple(feature.shape)} has {len(feature)}, gt has '
            f'{gt.num_images}. Pass the gt of this very batch.'
        )
    return gt


def foreground_mask(
    gt: GroundTruth,
    size: tuple[int, int],
    keep_padding: bool = False,
    keep_ignored: bool = False,
) -> Tensor:
    r"""One over its number of cells inside each box, 0 outside.

    A box covers the columns :math:`\lfloor x_1 \rfloor` to
    :math:`\lceil x_2 \rceil`, both included, and rows likewise. Cells beyond
    the map count in its size. Where boxes overlap, the smallest counts.

    Args:
        gt: Boxes of the batch.
        size: Rows and columns of the map.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.

    Reference:
        Yang et al., "Focal and Global Knowledge Distillation for Detectors",
        CVPR 2022, arXiv:2111.11837, with the integer box of the authors'
        code.

    Example:
        >>> gt = GroundTruth.from_boxes(
        ...     [torch.tensor([[0.0, 0, 8, 8]])], shape=(24, 24)
        ... )
        >>> foreground_mask(gt, (3, 3))[0, 0]
        tensor([[0.2500, 0.2500, 0.0000],
                [0.2500, 0.2500, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    extents = box_spans(gt.boxes, gt.shape, size, inclusive=True)
    mask = draw_boxes(*extents, gt.image, gt.num_images)
    return mask * valid_mask(gt, size, keep_padding, keep_ignored)


def background_mask(
    gt: GroundTruth,
    size: tuple[int, int],
    keep_padding: bool = False,
    keep_ignored: bool = False,
    foreground: Tensor | None = None,
) -> Tensor:
    """One over their number at the background cells of each image.

    Args:
        gt: Boxes of the batch.
        size: Rows and columns of the map.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
        foreground: :func:`foreground_mask` with the same arguments, where it
            is at hand already.

    Returns:
        Mask that sums to one over each image, or to zero if the image has no
        background cell, (N, 1, h, w).

    Reference:
        As :func:`foreground_mask`.
    """
    if foreground is None:
        foreground = foreground_mask(gt, size, keep_padding, keep_ignored)
    valid = valid_mask(gt, size, keep_padding, keep_ignored)
    background = valid * (foreground == 0)
    return background / background.sum((2, 3), keepdim=True).clamp(min=1)


def equal_weight(gt: GroundTruth | None, feature: Tensor) -> Tensor:
    """One for each cell of a map, 0 for the padded border, (N, 1, H, W).

    Args:
        gt: The batch, which knows its border; no cell is border if None.
        feature: The map, (N, C, H, W).
    """
    size = tuple(feature.shape[-2:])
    if gt is None:
        return feature.new_ones(len(feature), 1, *size, dtype=torch.float32)
    return valid_mask(gt, size)


def union_mask(
    gt: GroundTruth,
    size: tuple[int, int],
    keep_padding: bool = False,
    keep_ignored: bool = False,
) -> Tensor:
    """1 at the cells that some box overlaps, 0 elsewhere.

    Args:
        gt: Boxes of the batch.
        size: Rows and columns of the map.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
    """
    mask = _union(gt.boxes, gt.image, gt, size)
    return mask * valid_mask(gt, size, keep_padding, keep_ignored)


def valid_mask(
    gt: GroundTruth,
    size: tuple[int, int],
    keep_padding: bool = False,
    keep_ignored: bool = False,
) -> Tensor:
    """1 at the cells that count at all, 0 in padding and ignored boxes.

    A cell counts if its image reaches into it and no ignored box does.

    Args:
        gt: Sizes of the images, and ignored boxes.
        size: Rows and columns of the map.
        keep_padding: Let cells of the padded border count.
        keep_ignored: Let cells in ignored boxes count.
    """
    if keep_ignored or not len(gt.ignored):
        mask = gt.boxes.new_ones(gt.num_images, 1, *size, dtype=torch.float32)
    else:
        mask = 1 - _union(gt.ignored, gt.ignored_image, gt, size)
    padded = [] if keep_padding else enumerate(gt.image_shapes)
    for index, shape in padded:
        rows, columns = (
            -(-cells * own // whole)  # rounded up
            for cells, own, whole in zip(size, shape, gt.shape)
        )
        if rows < size[0]:
            mask[index, :, rows:].fill_(0)
        if columns < size[1]:
            mask[index, :, :, columns:].fill_(0)
    return mask


def resize_valid(
    feature: Tensor, valid: Tensor, size: Sequence[int]
) -> Tensor:
    """A map at another size, of which only the cells that count are read.

    Smaller sizes average the cells, larger ones interpolate bilinearly; each
    result is divided by the weight of the cells that count in it.

    Args:
        feature: Map, (N, C, H, W).
        valid: 1 where a cell counts, 0 elsewhere, (N, 1, H, W).
        size: Rows and columns wanted; with those of the map, cells that do
            not count become 0.

    Returns:
        Map, 0 where no cell counts, (N, C, h, w).

    Example:
        >>> feature = torch.tensor([[[[1.0, 3.0, 9.0, 9.0]]]])
        >>> valid = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]]]])
        >>> resize_valid(feature, valid, (1, 2)).tolist()
        [[[[2.0, 9.0]]]]
    """
    feature, size = as_float(feature) * valid, tuple(size)
    if size == tuple(feature.shape[-2:]):
        return feature
    smaller = all(a <= b for a, b in zip(size, feature.shape[-2:]))
    both = torch.cat([feature, valid.to(feature)], 1)
    if smaller:
        both = F.adaptive_avg_pool2d(both, size)
    else:
        both = F.interpolate(both, size, mode='bilinear')
    feature, weight = both[:, :-1], both[:, -1:]
    return feature / torch.where(weight > 0, weight, 1)


def masked_mean(feature: Tensor, valid: Tensor) -> Tensor:
    """Mean of each channel over the cells that count, (N, C).

    Args:
        feature: Map, (N, C, H, W).
        valid: 1 where a cell counts, 0 elsewhere, (N, 1, H, W).

    Example:
        >>> feature = torch.tensor([[[[1.0, 3.0, 9.0]]]])
        >>> masked_mean(feature, (feature < 5).float()).tolist()
        [[2.0]]
    """
    total = (as_float(feature) * valid).sum((2, 3))
    return total / valid.sum((2, 3)).clamp(min=1)


def maximum_per_image(
    draw: Callable[[slice], Tensor],
    image: Tensor,
    num_images: int,
    size: tuple[int, int],
    depth: int = 1,
) -> Tensor:
    """At each cell of each image, the largest value any of its boxes has.

    Args:
        draw: Values >= 0 of a slice of the boxes, (M', h, w).
        image: Index of the image each box belongs to, (M,).
        num_images: N.
        size: Rows and columns of the map.
        depth: Numbers that ``draw`` holds at once for each cell of a box; the
            slices are chosen accordingly.

    Returns:
        Mask, 0 where an image has no box, (N, 1, h, w).
    """
    rows, columns = size
    mask = torch.zeros(num_images, rows * columns, device=image.device)
    step = max(1, CHUNK // max(1, rows * columns * depth))
    for start in range(0, len(image), step):
        part = slice(start, start + step)
        values = draw(part).flatten(1).to(mask)
        owner = image[part, None].expand_as(values)
        mask.scatter_reduce_(0, owner, values, 'amax')
    return mask.view(num_images, 1, rows, columns)


def _union(
    boxes: Tensor, image: Tensor, gt: GroundTruth, size: tuple[int, int]
) -> Tensor:
    rows, columns, _ = box_spans(boxes, gt.shape, size, inclusive=False)
    return draw_boxes(
        rows, columns, rows.new_ones(len(boxes)), image, gt.num_images
    )


def draw_boxes(
    rows: Tensor, columns: Tensor, value: Tensor, image: Tensor, count: int
) -> Tensor:
    rows = rows * value[:, None]
    return maximum_per_image(
        lambda part: rows[part, :, None] * columns[part, None, :],
        image,
        count,
        (rows.shape[1], columns.shape[1]),
    )


def box_spans(
    boxes: Tensor,
    shape: tuple[int, int],
    size: tuple[int, int],
    inclusive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of each box, and one over its number of cells.

    Args:
        boxes: In pixels of the padded batch, (M, 4).
        shape: Height and width of the padded batch, pixels.
        size: Rows and columns of the map.
        inclusive: Count the cell *at* the rounded-up end as well.

    Returns:
        0 or 1 for each row, (M, h), each column, (M, w), and values, (M,).
    """
    boxes = as_float(boxes)
    # Multiplied first: an edge between two cells stays a whole number.
    x = boxes[:, 0::2] * size[1] / shape[1]
    y = boxes[:, 1::2] * size[0] / shape[0]
    # Comparisons with NaN are false: such a box marks nothing either.
    visible = (x[:, 0] < x[:, 1]) & (x[:, 0] < size[1]) & (x[:, 1] > 0)
    visible &= (y[:, 0] < y[:, 1]) & (y[:, 0] < size[0]) & (y[:, 1] > 0)
    rows, height = _cells(y, size[0], inclusive)
    columns, width = _cells(x, size[1], inclusive)
    value = torch.where(visible, 1 / (height * width), 0)
    return rows * visible[:, None].to(rows), columns, value


def _cells(
    edges: Tensor, count: int, inclusive: bool
) -> tuple[Tensor, Tensor]:
    first, end = edges[:, :1].floor(), edges[:, 1:].ceil() + inclusive
    cell = torch.arange(count, device=edges.device, dtype=edges.dtype)
    inside = (cell >= first) & (cell < end)
    return inside.to(edges), (end - first)[:, 0]
