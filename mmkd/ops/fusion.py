"""Boxes of several detectors of one image, brought together."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

#: How boxes are brought together.
FUSIONS = ('nms', 'wbf')


def fuse_boxes(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    count: int,
    how: str = 'nms',
    iou_threshold: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """One set of boxes out of those of several detectors.

    With ``'nms'`` the best of overlapping boxes of a class stays as it is.
    With ``'wbf'`` it becomes the mean of all that overlap it most, weighted
    by their scores, and its score their sum over the number of detectors: what
    few have seen counts less.

    Args:
        boxes: Of all detectors, x1 y1 x2 y2, (M, 4).
        scores: Their scores, (M,).
        labels: Their classes, (M,).
        count: Number of detectors.
        how: ``'nms'`` or ``'wbf'``.
        iou_threshold: Overlap from which boxes are the same object.

    Returns:
        Boxes (R, 4), scores and labels (R,), the best first.

    Reference:
        Solovyev et al., "Weighted boxes fusion: Ensembling boxes from
        different object detection models", Image and Vision Computing 2021,
        arXiv:1910.13302. There a box joins the present mean of others; here
        the best of them, so that there is no loop over boxes.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 10]])
        >>> scores, labels = torch.tensor([0.75, 0.25]), torch.tensor([1, 1])
        >>> fuse_boxes(boxes, scores, labels, count=2, how='wbf')[0]
        tensor([[0.0000, 0.0000, 8.0000, 8.5000]])
    """
    kept = batched_nms(boxes, scores, labels, iou_threshold)
    if how == 'nms' or not len(kept):
        return boxes[kept], scores[kept], labels[kept]
    overlap = box_iou(boxes, boxes[kept])
    same = labels[:, None] == labels[kept]
    overlap = overlap.masked_fill(~same, -1)
    best, owner = overlap.max(1)
    member = torch.zeros_like(overlap).scatter_(1, owner[:, None], 1)
    # Ties aside each kept box is its own; the others overlap by more.
    weight = (member * (best > 0)[:, None]).T * scores  # R, M
    total = weight.sum(1)
    fused = weight @ boxes / total.clamp(min=1e-12)[:, None]
    found = total / torch.maximum(
        (weight > 0).sum(1).to(total), total.new_tensor(float(count))
    )
    order = found.argsort(descending=True, stable=True)
    return fused[order], found[order], labels[kept][order]
