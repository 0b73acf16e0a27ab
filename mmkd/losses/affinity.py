"""Affinity: places are as similar to each other as for the teacher."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive, check_same_shape
from mmkd.ops.masks import require_ground_truth, valid_mask
from mmkd.ops.numeric import as_float, full_precision, unit
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def affinity_loss(
    student: Tensor,
    teacher: Tensor,
    patch_size: int = 4,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Mean squared difference of the cosines between places of an image.

    A place is a patch of cells, its vector :math:`x_i` their mean:

    .. math:: \frac{1}{N} \sum_n \frac{1}{R_n^2} \sum_{i,j}
        (a_{ij}^S - a_{ij}^T)^2, \quad
        a_{ij} = \frac{x_i^\top x_j}{\|x_i\| \|x_j\|}

    over the :math:`R_n` patches of an image that hold a cell that counts. A
    patch at the lower and right end may have fewer cells than others.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and size, without gradient,
            (N, C', H, W).
        patch_size: Cells of a patch in each direction.
        mask: 1 where a cell counts, 0 elsewhere, (N, 1, H, W); all if None.

    Returns:
        Scalar in [0, 4] that ignores scale and rotation of either side,
        computed in float32.

    Reference:
        As :class:`AffinityLoss`.

    Example:
        >>> x = torch.randn(2, 8, 8, 8)
        >>> affinity_loss(3 * x, x).item() < 1e-6
        True
    """
    check_same_shape('AffinityLoss', student[:, :1], teacher[:, :1])
    if mask is None:
        mask = torch.ones_like(as_float(student[:, :1]))
    own, other = (
        _affinities(one, mask, patch_size) for one in (student, teacher)
    )
    # A patch without a cell that counts is zero: its cosines are, too.
    error = (own - other).square().sum((1, 2))
    counts = (_pool(mask, patch_size) > 0).sum((1, 2, 3))
    return (error / counts.square().clamp(min=1)).mean()


def _affinities(feature: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Cosine of each two patches of an image, (N, R, R)."""
    # How many cells a patch has does not matter to its direction.
    places = _pool(as_float(feature) * mask, patch_size)
    directions = unit(places.flatten(2), dim=1)  # N, C, R
    with full_precision(directions):
        return directions.transpose(1, 2) @ directions


def _pool(feature: Tensor, patch_size: int) -> Tensor:
    return F.avg_pool2d(feature, patch_size, ceil_mode=True)


@MODELS.register_module()
class AffinityLoss(nn.Module):
    """Pair-wise affinity of the patches of a map, preserved.

    Affinities need no adapter: student and teacher may differ in channels,
    not in size. Cells of the padded border are in no patch; cells in ignored
    boxes are, as nothing here depends on what an object is. Without a ground
    truth all cells count.

    Memory grows with the square of the patches: with patches of 4 cells a P3
    of 100x168 cells has 1050, and 4.4 MB of affinities an image and side.

    Args:
        loss_weight: Factor of :func:`affinity_loss`; the default is ours.
        patch_size: Cells of a patch in each direction; 1 compares cells.
        keep_padding: Let cells of the padded border count.

    Reference:
        Liu et al., "Structured Knowledge Distillation for Semantic
        Segmentation", CVPR 2019, arXiv:1903.04197, of which the later
        versions go on to object detection. Its abstract, a second-hand
        definition and copies of the authors' code for segmentation were read,
        not the paper. The copies take the maximum of patches of half the map
        and no gradient through a vector's length; here a patch is a mean, as
        the definition has it, of a fixed number of cells, and the cosine is
        differentiated whole. The pixel-wise and adversarial parts of the
        method are not in this class.
    """

    example: ClassVar[dict] = dict()

    def __init__(
        self,
        loss_weight: float = 1.0,
        patch_size: int = 4,
        keep_padding: bool = False,
    ) -> None:
        super().__init__()
        check_positive('AffinityLoss', patch_size=patch_size)
        self.loss_weight = loss_weight
        self.patch_size = patch_size
        self.keep_padding = keep_padding

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        mask = None
        if gt is not None:
            gt = require_ground_truth('AffinityLoss', gt, student)
            mask = valid_mask(
                gt,
                tuple(student.shape[-2:]),
                self.keep_padding,
                keep_ignored=True,
            )
        return self.loss_weight * affinity_loss(
            student, teacher, self.patch_size, mask
        )
