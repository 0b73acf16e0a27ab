"""Boxes of a dense head, cell by cell, whatever form the head gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.models.dense_heads import (
    CenterNetUpdateHead,
    FoveaHead,
    RepPointsHead,
    TOODHead,
    VFNetHead,
    YOLOXHead,
)
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mmkd.ops.numeric import as_float


def anchors_of(head: nn.Module, level: int) -> int:
    """Anchors, or points, of a cell of a level."""
    found = getattr(head, 'num_base_priors', 1)
    return found[level] if isinstance(found, (list, tuple)) else found


def decodable(head: Any) -> bool:
    """Whether a head gives one box for each anchor, in a known form."""
    strange = isinstance(head, (FoveaHead, RepPointsHead, VFNetHead))
    known = hasattr(head, 'prior_generator') and (
        hasattr(head, 'bbox_coder') or isinstance(head, YOLOXHead)
    )
    return not strange and known and hasattr(head, 'num_classes')


def edge_bins(head: Any) -> int:
    """Bins of each edge that a head gives as a distribution; 0 if it does not.

    As GFL's heads do: distances from the centre of the anchor, in strides.
    """
    integral = getattr(head, 'integral', None)
    return integral.reg_max + 1 if hasattr(integral, 'reg_max') else 0


def edge_origins(head: nn.Module, priors: Any) -> Tensor:
    """Where a head of distributions measures edges from, (M, 2)."""
    return head.anchor_center(get_box_tensor(priors))


def check_decodable(who: str, head: nn.Module, side: str) -> None:
    """A head must give one box for each anchor of each cell.

    Args:
        who: Name of the term, for messages.
        head: The head.
        side: Whose it is, ``'student'`` or ``'teacher'``.

    Raises:
        ValueError: If it gives none, or in a form that is not known here.
    """
    if not decodable(head):
        raise ValueError(
            f'{who} compares the boxes of each cell, which cannot be read '
            f"off the {side}'s {type(head).__name__}. Choose a term on class "
            f'scores or features for this pair.'
        )


def check_same_anchors(who: str, own: nn.Module, other: nn.Module) -> None:
    """Two heads must have the same strides and as many anchors a cell.

    Args:
        who: Name of the term, for messages.
        own, other: Heads of the student and of the teacher.

    Raises:
        ValueError: If a level differs.
    """
    found = [
        [
            (stride, anchors_of(head, level))
            for level, stride in enumerate(head.prior_generator.strides)
        ]
        for head in (own, other)
    ]
    if found[0] != found[1]:
        raise ValueError(
            f'{who} pairs boxes anchor by anchor, so that strides and '
            f'anchors a cell are the same level by level. The student has '
            f'{found[0]}, the teacher {found[1]}. Choose a teacher with the '
            f'same, or a term on features.'
        )


def decode(head: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Boxes that a dense head predicts, in pixels of its input.

    Args:
        head: Any head of MMDetection with anchors or points: RetinaNet, FCOS,
            ATSS, GFL, PAA, DDOD, TOOD, SSD, RPN, RTMDet, YOLOX. Those that
            scale boxes in training otherwise than in evaluation are read in
            the mode they are in.
        maps: What it returns of boxes, one map a level, (N, A·4, H, W); of a
            head of distributions (N, A·4·B, H, W).

    Returns:
        Corners x1 y1 x2 y2 of each level, (N, A, 4, H, W), float32.
    """
    sizes = [tuple(one.shape[-2:]) for one in maps]
    more = dict(with_stride=True) if isinstance(head, YOLOXHead) else {}
    priors = head.prior_generator.grid_priors(
        sizes, device=maps[0].device, **more
    )
    return [
        _corners(head, as_float(boxes), get_box_tensor(prior), level)
        for level, (boxes, prior) in enumerate(zip(maps, priors))
    ]


def _corners(
    head: nn.Module, boxes: Tensor, priors: Tensor, level: int
) -> Tensor:
    anchors, stride = anchors_of(head, level), stride_of(head, level)
    height, width = boxes.shape[-2:]
    rows = (
        boxes.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2).flatten(0, 3)
    )  # by image, row, column and anchor
    if isinstance(head, TOODHead):
        corners = rows * stride
    elif isinstance(head, YOLOXHead):
        rows = rows.unflatten(0, (len(boxes), -1))
        corners = head._bbox_decode(priors, rows).flatten(0, 1)
    else:
        priors = priors.repeat(len(boxes), 1)
        if hasattr(head, 'integral'):
            rows = head.integral(rows) * stride
            priors = head.anchor_center(priors)
        elif head.training and _scales_later(head):
            rows = rows * stride
        corners = head.bbox_coder.decode(priors, rows)
    corners = get_box_tensor(corners).reshape(
        len(boxes), height, width, anchors, 4
    )
    return corners.permute(0, 3, 4, 1, 2)


def _scales_later(head: nn.Module) -> bool:
    """Whether boxes are in strides in training and in pixels afterwards."""
    return isinstance(head, CenterNetUpdateHead) or getattr(
        head, 'norm_on_bbox', False
    )


def stride_of(head: nn.Module, level: int) -> float:
    """Pixels from cell to cell; heads have the same in both directions."""
    stride: Any = head.prior_generator.strides[level]
    return stride[0] if isinstance(stride, (list, tuple)) else stride
