"""What a map says about each object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from mmkd.ops.numeric import as_float
from mmkd.structures import GroundTruth


def region_vectors(
    feature: Tensor,
    gt: GroundTruth | None,
    output_size: int = 7,
    limit: int | None = None,
) -> Tensor:
    """Mean of a map over each ground-truth box of the batch.

    A box is sampled by RoIAlign at two points a bin and direction, however
    large it is, then averaged. A box of zero size gives the map at its
    point, one beyond the map gives zeros.

    Args:
        feature: Map of one level, (N, C, H, W). It covers the padded input
            whatever its stride is.
        gt: Boxes of the batch.
        output_size: Bins of a box in each direction.
        limit: At most so many boxes, evenly spread over the batch; all if
            None.

    Returns:
        One vector a box, all images together, (M, C), float32.

    Raises:
        ValueError: If there is no ground truth to read boxes from.

    Reference:
        RoIAlign: He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870.

    Example:
        >>> gt = GroundTruth.from_boxes(
        ...     [torch.tensor([[0.0, 0, 8, 8]])], shape=(16, 16)
        ... )
        >>> region_vectors(torch.ones(1, 3, 4, 4), gt).tolist()
        [[1.0, 1.0, 1.0]]
    """
    if gt is None:
        raise ValueError(
            'Losses over regions need the boxes of the batch, got gt=None. '
            'Call them as loss(student, teacher, gt) with a GroundTruth.'
        )
    feature = as_float(feature)
    boxes, image = gt.boxes, gt.image
    if limit is not None and len(boxes) > limit:
        chosen = torch.arange(limit, device=boxes.device)
        chosen = chosen * len(boxes) // limit
        boxes, image = boxes[chosen], image[chosen]
    return region_bins(feature, boxes, image, gt.shape, output_size).mean(
        (2, 3)
    )


def region_bins(
    feature: Tensor,
    boxes: Tensor,
    image: Tensor,
    shape: tuple[int, int],
    output_size: int = 7,
) -> Tensor:
    """What a map holds in each bin of boxes, by RoIAlign.

    Args:
        feature: Map of one level, (N, C, H, W).
        boxes: x1 y1 x2 y2 in pixels, (R, 4).
        image: Index of the image of each box, (R,).
        shape: Height and width that the map covers, pixels.
        output_size: Bins of a box in each direction.

    Returns:
        (R, C, output_size, output_size), float32.
    """
    feature = as_float(feature)
    # Scaled here, not by roi_align: rows and columns may differ in stride.
    (height, width), (rows, columns) = shape, feature.shape[-2:]
    x = boxes[:, 0::2] * (columns / width)
    y = boxes[:, 1::2] * (rows / height)
    corners = torch.stack([x, y], 2).flatten(1)  # x1 y1 x2 y2
    regions = torch.cat([image[:, None].to(feature), corners.to(feature)], 1)
    return roi_align(
        feature, regions, output_size, sampling_ratio=2, aligned=True
    )


def pyramid_level(
    boxes: Tensor,
    strides: Sequence[float],
    side: float = 224,
    stride: float = 16,
) -> Tensor:
    """Index of the level that each box is read from, (…, 4) → (…).

    Args:
        boxes: x1 y1 x2 y2 in pixels.
        strides: Pixels a cell of each level, the finest first.
        side: Root of the area of a box that is read at the stride below, one
            of twice the side from twice the stride.
        stride: Of that level.

    Reference:
        Lin et al., "Feature Pyramid Networks for Object Detection", CVPR
        2017, arXiv:1612.03144, equation 1.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 50, 50], [0, 0, 300, 300]])
        >>> pyramid_level(boxes, (8, 16, 32)).tolist()
        [0, 1]
    """
    length = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt()
    wanted = stride * torch.exp2((length / side).log2().floor())
    return sum(
        ((wanted >= one).long() for one in strides[1:]),
        torch.zeros_like(wanted, dtype=torch.long),
    )


def pyramid_bins(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    shape: tuple[int, int],
    output_size: int = 7,
) -> Tensor:
    """What the maps hold in the bins of boxes, each read at its level.

    Every level is read at every box, for which boxes are whose is not known
    to the host.

    Args:
        maps: (N, C, H, W) a level.
        boxes: x1 y1 x2 y2 in pixels, (R, 4).
        image: Index of the image of each box, (R,).
        level: Index of the level of each box, (R,).
        shape: Height and width that the maps cover, pixels.
        output_size: Bins of a box in each direction.

    Returns:
        (R, C, output_size, output_size), float32.
    """
    found = 0.0
    for index, one in enumerate(maps):
        here = (level == index)[:, None, None, None]
        bins = region_bins(one, boxes, image, shape, output_size)
        found = found + torch.where(here, bins, 0)
    return found


def pyramid_vectors(
    who: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    gt: GroundTruth | None,
    boxes: Tensor | None = None,
    side: float = 224,
    output_size: int = 7,
) -> tuple[Tensor, Tensor]:
    """Means of both sides' maps over boxes, each read at its object's level.

    Args:
        who: Named in messages.
        student, teacher: Maps of the same levels, (N, C, H, W) each; the
            student's strides say which level an object is read from.
        gt: Boxes of the batch.
        boxes: V boxes of each object, (M, V, 4), all read from the object's
            level; the object's own if None.
        side: As for :func:`pyramid_level`.
        output_size: Bins of a box in each direction.

    Returns:
        (M, V, C) of either side, float32.

    Raises:
        ValueError: If there is no ground truth, or one side has more levels.
    """
    if gt is None:
        raise ValueError(
            f'{who} reads the boxes of the batch, got gt=None. Call it as '
            f'loss(student, teacher, gt) with a GroundTruth.'
        )
    if len(student) != len(teacher):
        raise ValueError(
            f'{who} reads an object from the same level of both sides, got '
            f'{len(student)} levels of the student and {len(teacher)} of the '
            f'teacher. Choose levels of one stride with levels= and '
            f'teacher_levels=.'
        )
    if boxes is None:
        boxes = gt.boxes[:, None]
    views = boxes.shape[1]
    strides = [gt.shape[0] / one.shape[-2] for one in student]
    level = pyramid_level(gt.boxes, strides, side)
    places = (
        boxes.flatten(0, 1),
        gt.image.repeat_interleave(views),
        level.repeat_interleave(views),
    )
    own, other = (
        pyramid_bins(maps, *places, gt.shape, output_size)
        .mean((2, 3))
        .unflatten(0, (len(boxes), views))
        for maps in (student, teacher)
    )
    return own, other


def jittered_boxes(
    boxes: Tensor, sizes: Tensor, count: int, jitter: float
) -> Tensor:
    """Each box, and boxes beside it: views of the same object.

    The centre of a view is moved by up to ``jitter`` of the side, and each
    side grown or shrunk by as much. Views end at the border of the image.

    Args:
        boxes: x1 y1 x2 y2 in pixels, (M, 4).
        sizes: Width and height of the image of each box, (M, 2).
        count: Views of a box.
        jitter: Share of the side.

    Returns:
        The box first, then its views, (M, 1 + count, 4). Drawn from torch's
        global random state.
    """
    centre, side = (
        (boxes[:, None, :2] + boxes[:, None, 2:]) / 2,
        boxes[:, None, 2:] - boxes[:, None, :2],
    )
    shape = len(boxes), count, 2
    shift, growth = (
        jitter * (2 * torch.rand(shape, device=boxes.device) - 1)
        for _ in range(2)
    )
    centre, half = centre + shift * side, (1 + growth) * side / 2
    limit = sizes[:, None].to(boxes)
    low, high = (
        torch.minimum(one.clamp(min=0), limit)
        for one in (centre - half, centre + half)
    )
    return torch.cat([boxes[:, None], torch.cat([low, high], 2)], 1)
