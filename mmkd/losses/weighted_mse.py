"""Weighted MSE: squared error of cells that count as a weight says."""

from __future__ import annotations

from torch import Tensor, nn

from mmkd.checks import check_same_shape
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def weighted_mse_loss(
    student: Tensor, teacher: Tensor, weight: Tensor
) -> Tensor:
    r"""Squared difference, averaged over channels and weighted over cells.

    .. math:: \frac{\sum_{nij} w_{nij} \sum_c (S - T)^2_{ncij}}
                   {C \sum_{nij} w_{nij}}

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        weight: How much each cell counts, at least 0, (N, 1, H, W).

    Returns:
        Scalar, 0 where nothing counts, computed in float32.

    Example:
        >>> import torch
        >>> x, weight = torch.zeros(1, 2, 1, 2), torch.tensor([[[[3.0, 1]]]])
        >>> other = torch.tensor([[[[2.0, 0]], [[2.0, 4]]]])
        >>> weighted_mse_loss(x, other, weight).item()  # (3·4 + 1·8) / 4
        5.0
    """
    check_same_shape('WeightedMSELoss', student, teacher)
    weight = as_float(weight)
    error = (as_float(student) - as_float(teacher)).square()
    error = error.mean(1, keepdim=True)
    # Where nothing counts, the sum above is zero as well.
    return (weight * error).sum() / weight.sum().clamp(min=1e-6)


@MODELS.register_module()
class WeightedMSELoss(nn.Module):
    """Module form of :func:`weighted_mse_loss`, times ``loss_weight``.

    Called without a weight, every cell counts alike that is not border.

    Not kept:
        batch: The sum is divided by the weights of the whole batch.

    Reference:
        With the teacher's class scores as weight and an adapter for the
        student it is the feature part of Du et al., "Distilling Object
        Detectors with Feature Richness", NeurIPS 2021, arXiv:2111.00674. There
        channels are summed: their weight times the number of channels is
        ``loss_weight`` here.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        gt: GroundTruth | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        if weight is None:
            weight = equal_weight(gt, student)
        return self.loss_weight * weighted_mse_loss(student, teacher, weight)
