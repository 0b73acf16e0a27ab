"""What a map says about each object."""

from __future__ import annotations

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
    boxes, image = gt.boxes.to(feature), gt.image.to(feature)
    if limit is not None and len(boxes) > limit:
        chosen = torch.arange(limit, device=boxes.device)
        chosen = chosen * len(boxes) // limit
        boxes, image = boxes[chosen], image[chosen]
    # Scaled here, not by roi_align: rows and columns may differ in stride.
    (height, width), (rows, columns) = gt.shape, feature.shape[-2:]
    x = boxes[:, 0::2] * (columns / width)
    y = boxes[:, 1::2] * (rows / height)
    corners = torch.stack([x, y], 2).flatten(1)  # x1 y1 x2 y2
    regions = torch.cat([image[:, None], corners], 1)
    bins = roi_align(
        feature, regions, output_size, sampling_ratio=2, aligned=True
    )
    return bins.mean((2, 3))
