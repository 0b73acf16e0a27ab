"""DeFeat: objects and background are imitated apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.checks import check_positive, check_same_shape
from mmkd.ops.masks import require_ground_truth, union_mask, valid_mask
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def defeat_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    r"""Half the mean squared difference where the mask is one.

    .. math:: \frac{\sum M (S - T)^2}{2 C \sum M}

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        mask: 0 or 1 for each cell, (N, 1, H, W).

    Returns:
        Scalar, 0 for an empty mask, computed in float32.

    Example:
        >>> x, mask = torch.zeros(1, 8, 4, 4), torch.zeros(1, 1, 4, 4)
        >>> mask[..., 1:3] = 1
        >>> defeat_loss(x + 3, x, mask).item()
        4.5
    """
    check_same_shape('DeFeatLoss', student, teacher)
    difference = as_float(student) - as_float(teacher)
    error = difference.square().mean(1, keepdim=True)
    return (mask * error).sum() / (2 * mask.sum()).clamp(min=1)


@MODELS.register_module()
class DeFeatLoss(nn.Module):
    """Mean error over the boxes and over the rest, each with its weight.

    This is the part of DeFeat on the neck. Its other part, on the class
    scores of positive and negative proposals, is
    :class:`~mmkd.terms.proposal.ProposalTerm`.

    Both parts are means: over channels, over the cells of all images of the
    batch, and over the levels. The authors' function counts the mask once for
    each channel, and their weights belong to that.

    Args:
        foreground_weight: Factor of ``foreground``. Published for Faster
            R-CNN on VOC: 3.
        background_weight: Factor of ``background``. Published likewise: 12.
        finest_scale: Put each box on one level only, by its size: the first
            up to twice this side in pixels, the next up to four times, and so
            on; it is background on the others. The authors' code for two-stage
            detectors has 56 for P2 to P6. None puts every box on every level.
        keep_padding: Let cells of the padded border count, as in the
            authors' code, which has no notion of them.
        keep_ignored: Let cells in ignored boxes count, likewise.
        loss_weight: Factor of both parts.

    Returns:
        ``foreground`` and ``background``.

    Not kept:
        batch: Means are those over the cells of the whole batch.

    Reference:
        Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR
        2021, arXiv:2103.14475, weights and normalisation as in the authors'
        code. There the student passes a 3x3 convolution first, and a box
        loses the cells that it covers in part at its lower and right end;
        here it has every cell it overlaps.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict()

    def __init__(
        self,
        foreground_weight: float = 3.0,
        background_weight: float = 12.0,
        finest_scale: float | None = None,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if finest_scale is not None:
            check_positive('DeFeatLoss', finest_scale=finest_scale)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.finest_scale = finest_scale
        self.keep_padding = keep_padding
        self.keep_ignored = keep_ignored
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> dict[str, Tensor]:
        gt = require_ground_truth('DeFeatLoss', gt, student[0])
        foreground = background = 0.0
        for level, (one, other) in enumerate(zip(student, teacher)):
            check_same_shape('DeFeatLoss', one, other)
            objects, rest = self.masks(gt, one, level, len(student))
            foreground = foreground + defeat_loss(one, other, objects)
            background = background + defeat_loss(one, other, rest)
        share = self.loss_weight / len(student)
        return dict(
            foreground=share * self.foreground_weight * foreground,
            background=share * self.background_weight * background,
        )

    def masks(
        self, gt: GroundTruth, feature: Tensor, level: int, levels: int
    ) -> tuple[Tensor, Tensor]:
        """Cells of objects and of background, 0 or 1, (N, 1, H, W) each.

        Args:
            gt: Boxes of the batch.
            feature: Map of the level.
            level: Position of the map among those compared, 0 is the finest.
            levels: How many are compared.
        """
        if self.finest_scale is not None:
            here = assign_by_size(gt.boxes, self.finest_scale, levels) == level
            # Selecting boxes would wait for the device; zeroed ones mark
            # nothing.
            gt = replace(gt, boxes=torch.where(here[:, None], gt.boxes, 0))
        place = (
            gt,
            tuple(feature.shape[-2:]),
            self.keep_padding,
            self.keep_ignored,
        )
        objects = union_mask(*place)
        return objects, valid_mask(*place) - objects


def assign_by_size(boxes: Tensor, finest_scale: float, levels: int) -> Tensor:
    r"""Level of each box, :math:`\lfloor \log_2(\sqrt{hw} / scale) \rfloor`.

    Args:
        boxes: x1 y1 x2 y2 in pixels, (M, 4).
        finest_scale: Side up to twice of which a box is on level 0, pixels.
        levels: Number of levels; boxes beyond are on the nearest.

    Returns:
        Levels in [0, levels), (M,).

    Reference:
        Lin et al., "Feature Pyramid Networks for Object Detection", CVPR
        2017, arXiv:1612.03144, equation 1.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 112, 112]])
        >>> assign_by_size(boxes, 56, 5).tolist()
        [0.0, 1.0]
    """
    sides = as_float(boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    level = (sides.prod(1).sqrt() / finest_scale).log2().floor()
    return level.clamp(0, levels - 1)
