"""Quality: the cells from which the teacher predicts each object best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mmkd.checks import check_fraction, check_positive
from mmkd.ops.boxes import iou
from mmkd.ops.masks import CHUNK, valid_mask
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Step
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.decoding import anchors_of, check_decodable, decode
from mmkd.terms.term import Term
from mmkd.terms.weights.score import refuse_softmax
from mmkd.terms.weights.weight import Weight

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Variance that is added to a Gaussian, in square pixels. The authors shake
#: each centre by up to 0.05 pixels instead, which has this one.
SHAKE = 0.1**2 / 12


@MODELS.register_module()
class QualityWeight(Weight):
    r"""A Gaussian over the cells that predict an object best.

    The quality of cell x for an object of class c with box b is

    .. math:: q_x = \sigma(z_{xc})^{1 - \xi} \; IoU(b_x, b)^{\xi}

    if its centre lies inside b, else 0, with the teacher's logits z and boxes
    :math:`b_x`. To the centres of the ``topk`` best cells of all levels
    together a Gaussian is fitted by maximum likelihood. These cells get

    .. math:: w_x = \exp(-\tfrac12 (x - \mu)^T \Sigma^{-1} (x - \mu))

    and all others 0. A cell that is good for several objects gets the largest
    of its values; one in the padded border or in an ignored box gets 0.

    Args:
        topk: Cells of an object; fewer where fewer are inside.
        iou_power: The exponent :math:`\xi`. Published: 0.8 for features of
            classes, 0.6 for those of boxes.
        tap: The teacher's dense head.

    Raises:
        ValueError: If an argument is out of range, the head's boxes cannot be
            read, or its scores are not a sigmoid each.

    Reference:
        Yang et al., "Prediction-Guided Distillation for Dense Object
        Detection", ECCV 2022, arXiv:2203.05469. Read: the abstract, and the
        authors' code and configs (https://github.com/ChenhongyiYang/PGD) for
        facts. There the best cells are taken from everywhere, and those
        outside of the box dropped after the fit; centres are shaken at random,
        where here the variance is added; boxes of GFL are scaled by the stride
        of the level whose number is that of the image, here by their own.
        Ours: of several anchors the best counts, and cells of no quality at
        all are no candidates.
    """

    needs_classes = True

    def __init__(
        self, topk: int = 30, iou_power: float = 0.8, tap: str = 'bbox_head'
    ) -> None:
        super().__init__()
        check_positive('QualityWeight', topk=topk)
        check_fraction('QualityWeight', iou_power=iou_power)
        self.topk, self.iou_power, self.tap = topk, iou_power, tap

    def bind(self, term: Term, student: nn.Module, teacher: Teacher) -> None:
        self.teacher = teacher.name
        teacher.tap(self.tap)
        head, _ = resolve(teacher.detector, self.tap)
        check_decodable('QualityWeight', head, 'teacher')
        refuse_softmax('QualityWeight', teacher.detector, self.tap, 'teacher')

    def forward(self, step: Step) -> Sequence[Tensor]:
        shown = step.teacher(self.teacher)
        head, _ = resolve(shown.detector, self.tap)
        who = f'The tap {self.tap!r}'
        scores, boxes = (
            maps_of(shown.at(self.tap), who, output) for output in (0, 1)
        )
        anchors = (-1, head.cls_out_channels)
        sizes = [tuple(one.shape[-2:]) for one in scores]
        weight = best_cells(
            _cells([one.unflatten(1, anchors) for one in scores]),
            _cells(decode(head, boxes)),
            _centres(head, sizes, scores[0].device),
            step.gt,
            self.topk,
            self.iou_power,
        )
        levels = weight.split([rows * columns for rows, columns in sizes], 1)
        maps = tuple(
            level.unflatten(1, (1, *size))
            for level, size in zip(levels, sizes)
        )
        return [
            one * valid_mask(step.gt, tuple(one.shape[-2:]))
            for one in crop(maps, shown.size, step.images.shape[-2:])
        ]


def best_cells(
    scores: Tensor,
    boxes: Tensor,
    centres: Tensor,
    gt: GroundTruth,
    topk: int,
    iou_power: float,
) -> Tensor:
    """What :class:`QualityWeight` gives the P cells of all levels, (N, P).

    Args:
        scores: Logits of each class, (N, P, A, C).
        boxes: x1 y1 x2 y2, (N, P, A, 4).
        centres: x y of the cells, (P, 2).
        gt: Boxes of the batch.
        topk: Cells of an object.
        iou_power: Exponent of the IoU.
    """
    cells = len(centres)
    step = max(1, CHUNK // boxes[0].numel())
    found = []
    for start in range(0, max(1, len(gt.boxes)), step):
        part = slice(start, start + step)
        image, label, box = gt.image[part], gt.labels[part], gt.boxes[part]
        inside = (centres > box[:, None, :2]) & (centres < box[:, None, 2:])
        fit = iou(boxes[image], box[:, None, None])
        score = as_float(scores[image, :, :, label]).sigmoid()  # M, P, A
        quality = score ** (1 - iou_power) * fit**iou_power
        quality = inside.all(2) * quality.amax(2)  # M, P
        found.append(quality.topk(min(topk, cells), dim=1))
    quality = torch.cat([one.values for one in found])
    index = torch.cat([one.indices for one in found])
    value = density(centres[index], (quality > 0).to(quality))
    weight = value.new_zeros(gt.num_images * cells)
    place = gt.image[:, None] * cells + index
    weight.scatter_reduce_(0, place.flatten(), value.flatten(), 'amax')
    return weight.view(gt.num_images, cells)


def density(points: Tensor, count: Tensor) -> Tensor:
    """Gaussians, fitted to points, at these points; 1 at the mean.

    Args:
        points: x y of K points of each object, (M, K, 2).
        count: 1 for the points that are there, 0 for others, (M, K).

    Returns:
        (M, K), 0 for points that are not there.

    Example:
        >>> points = torch.tensor([[[0.0, 0], [2, 0], [9, 9]]])
        >>> density(points, torch.tensor([[1.0, 1, 0]])).round(decimals=2)
        tensor([[0.6100, 0.6100, 0.0000]])
    """
    total = count.sum(1, keepdim=True).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return (count * values).sum(1, keepdim=True) / total

    x, y = as_float(points).unbind(2)
    x, y = x - mean(x), y - mean(y)
    # Of y, the part that follows from x and the rest: a determinant would be
    # a difference of large numbers where the points lie on a slant.
    spread = mean(x.square()) + SHAKE
    slope = mean(x * y) / spread
    rest = y - slope * x
    left = mean(rest.square()) + SHAKE * (1 + slope.square())
    distance = x.square() / spread + rest.square() / left
    return count * (-distance / 2).exp()


def _cells(levels: Sequence[Tensor]) -> Tensor:
    """Maps (N, A, K, H, W) of all levels, cell by cell, (N, P, A, K)."""
    return torch.cat([one.flatten(3).permute(0, 3, 1, 2) for one in levels], 1)


def _centres(
    head: nn.Module, sizes: Sequence[tuple[int, int]], device: torch.device
) -> Tensor:
    """Where the cells of all levels lie, x y in pixels, (P, 2)."""
    priors = head.prior_generator.grid_priors(sizes, device=device)
    first = [
        as_float(get_box_tensor(one))[:: anchors_of(head, level)]
        for level, one in enumerate(priors)
    ]
    every = torch.cat(first)
    # Corners of an anchor, or a point that is its own corner.
    return (every[:, :2] + every[:, -2:]) / 2
