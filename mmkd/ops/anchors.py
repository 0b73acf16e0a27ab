"""Anchors near objects that a label assignment leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou, distance_box_iou

from mmkd.ops.numeric import as_float
from mmkd.structures import GroundTruth


def valuable_region(
    anchors: Sequence[Tensor],
    gt: GroundTruth,
    topk: int = 9,
    ratio: float = 0.25,
) -> list[Tensor]:
    r"""IoU with a box of the anchors that are close to it and not positive.

    A box's threshold :math:`\alpha` is that of ATSS: mean plus deviation of
    its IoU with the ``topk`` anchors of each level whose centres are nearest.
    An anchor is valuable for the box if its DIoU lies in
    :math:`[ratio \cdot \alpha, \alpha)`.

    Args:
        anchors: ``x1 y1 x2 y2`` in pixels, (A_l, 4) a level, the same for
            every image.
        gt: Boxes of the batch.
        topk: Nearest anchors a level.
        ratio: Of the lower to the upper end.

    Returns:
        The largest IoU with a box that the anchor is valuable for, 0 where
        there is none, (N, A_l) a level.

    Reference:
        Zheng et al., "Localization Distillation for Dense Object Detection",
        CVPR 2022, arXiv:2102.12252, algorithm 1, from a summary; their region
        holds positives of other boxes as well.
    """
    sizes = [len(one) for one in anchors]
    every = as_float(torch.cat(list(anchors)))
    boxes = as_float(gt.boxes)
    iou = box_iou(every, boxes)  # (A, M)
    threshold = _threshold(every, boxes, iou, sizes, topk)
    diou = distance_box_iou(every, boxes)
    near = (diou >= ratio * threshold) & (diou < threshold)
    images = torch.arange(gt.num_images, device=boxes.device)
    own = gt.image[None] == images[:, None]  # (N, M)
    value = own[:, None] * (near * iou)[None]  # (N, A, M)
    nothing = value.new_zeros(*value.shape[:2], 1)
    weight = torch.cat([value, nothing], 2).amax(2)
    return list(weight.split(sizes, 1))


def _threshold(
    anchors: Tensor,
    boxes: Tensor,
    iou: Tensor,
    sizes: Sequence[int],
    topk: int,
) -> Tensor:
    """ATSS's threshold of each box, (M,)."""
    centres, middles = (
        (one[:, :2] + one[:, 2:]) / 2 for one in (anchors, boxes)
    )
    distance = torch.cdist(centres, middles)
    found = []
    for far, overlap in zip(distance.split(sizes), iou.split(sizes)):
        nearest = far.topk(min(topk, len(far)), dim=0, largest=False).indices
        found.append(overlap.gather(0, nearest))
    chosen = torch.cat(found)
    if not chosen.numel():  # std() would warn
        return chosen.mean(0)
    return chosen.mean(0) + chosen.std(0)
