"""Non-maximum suppression and overlaps of boxes."""

from __future__ import annotations

import numpy as np
import torch
import torchvision
from torch import Tensor

from .common import wide

NAIVE, LINEAR, GAUSSIAN = range(3)


@torch.no_grad()
def nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int
) -> Tensor:
    """Greedy suppression of boxes that overlap a better one.

    Args:
        boxes: ``x1 y1 x2 y2``, (N, 4).
        scores: (N,).
        iou_threshold: Suppressed above it.
        offset: 1 where a box covers its last pixel, so that its width is
            ``x2 - x1 + 1``, else 0.

    Returns:
        Indices of the kept boxes, best first.
    """
    boxes, scores = wide(boxes, scores)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torchvision.ops.nms(boxes, scores, iou_threshold)


@torch.no_grad()
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    r"""Greedy rescoring: the best box lowers the scores of those it overlaps.

    The factor is 0 from the threshold on (naive), :math:`1 - IoU` from the
    threshold on (linear), or :math:`\exp(-IoU^2 / \sigma)` (Gaussian). Of two
    boxes with the same score, the first of the input is taken first.

    Args:
        boxes: ``x1 y1 x2 y2``, (N, 4).
        scores: (N,).
        dets: Buffer for boxes and new scores, (N, 5); its first rows are
            written.
        iou_threshold: Where naive and linear begin.
        sigma: Width of the Gaussian.
        min_score: Boxes that fall below it are dropped.
        method: 0 naive, 1 linear, 2 Gaussian.
        offset: Added to widths and heights.

    Returns:
        Indices of the boxes in ``dets``, (K,).

    Reference:
        Bodla et al., "Soft-NMS: Improving Object Detection With One Line of
        Code", ICCV 2017, arXiv:1704.04503.
    """
    # One box at a time, each step a handful of operations on a few hundred
    # numbers: NumPy's smaller overhead counts here.
    wide_boxes, wide_scores = wide(boxes.cpu(), scores.cpu())
    table, score = _table(wide_boxes, offset), wide_scores.numpy().copy()
    index = np.arange(len(score))
    gone = np.zeros(len(score), dtype=bool)
    kept, values = [], []
    left = len(score)
    while left:
        best = score.argmax()
        kept.append(index[best])
        values.append(score[best])
        gone[best] = True
        iou = _iou(table[:, best], table)
        if method == GAUSSIAN:
            score *= np.exp(-(iou * iou) / sigma)
        else:
            factor = 1 - iou if method == LINEAR else 0
            near = (iou >= iou_threshold) & ~gone
            np.multiply(score, factor, out=score, where=near)
        gone |= score < min_score
        score[gone] = -np.inf
        left = len(gone) - np.count_nonzero(gone)
        if left < len(gone) / 2:
            table, index, score = table[:, ~gone], index[~gone], score[~gone]
            gone = np.zeros(left, dtype=bool)
    order = torch.as_tensor(np.array(kept, dtype=np.int64))
    count = len(kept)
    dets[:count, :4] = wide_boxes[order].to(dets)
    dets[:count, 4] = torch.as_tensor(np.array(values)).to(dets)
    return order.to(boxes.device)


@torch.no_grad()
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Which boxes each kept box suppresses.

    Args:
        dets: ``x1 y1 x2 y2 score``, (N, 5).
        iou_threshold: Suppressed from it on.

    Returns:
        One list a kept box, best first: its index, then those of the boxes it
        suppressed, by falling score.
    """
    (rows,) = wide(dets.cpu())
    index = rows[:, 4].argsort(descending=True, stable=True)
    table, index = _table(rows[index, :4], offset=0), index.numpy()
    free = np.ones(len(index), dtype=bool)
    groups = []
    for first in range(len(index)):
        if not free[first]:
            continue
        rest = free[first:]
        matched = _iou(table[:, first], table[:, first:]) >= iou_threshold
        matched &= rest
        matched[0] = True  # of an empty box with itself there is no overlap
        rest[matched] = False
        groups.append(index[first:][matched].tolist())
    return groups


@torch.no_grad()
def bbox_overlaps(
    bboxes1: Tensor,
    bboxes2: Tensor,
    ious: Tensor,
    mode: int,
    aligned: bool,
    offset: int,
) -> None:
    """Intersection over union (mode 0) or over the first box (mode 1).

    Args:
        bboxes1: ``x1 y1 x2 y2``, (M, 4).
        bboxes2: (K, 4), or (M, 4) if aligned.
        ious: Buffer for the result, (M, K), or (M,) if aligned.
        mode: 0 or 1.
        aligned: Compare row by row instead of each with each.
        offset: Added to widths and heights.
    """
    first, second = wide(bboxes1, bboxes2)
    if not aligned:
        first = first[:, None]
    size1 = first[..., 2:] - first[..., :2] + offset
    size2 = second[..., 2:] - second[..., :2] + offset
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low + offset).clamp(min=0).prod(-1)
    area = size1.prod(-1)
    if mode == 0:
        area = area + size2.prod(-1) - shared
    smallest = torch.finfo(area.dtype).tiny
    ious.copy_(shared / area.clamp(min=smallest))


def _table(boxes: Tensor, offset: int) -> np.ndarray:
    """``x1 y1 x2 y2 area`` of boxes (N, 4), as rows (5, N)."""
    x1, y1, x2, y2 = boxes.numpy().T
    x2, y2 = x2 + offset, y2 + offset
    return np.stack((x1, y1, x2, y2, (x2 - x1) * (y2 - y1)))


def _iou(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Overlap of one box (5,) with many (5, N); 0 where both are empty."""
    width = np.minimum(many[2], one[2]) - np.maximum(many[0], one[0])
    height = np.minimum(many[3], one[3]) - np.maximum(many[1], one[1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    union = many[4] + one[4] - shared
    return shared / np.maximum(union, np.finfo(union.dtype).tiny)
