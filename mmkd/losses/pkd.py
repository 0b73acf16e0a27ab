"""PKD: imitate the pattern of the teacher's features, not their scale."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_same_shape
from mmkd.ops.numeric import standardise
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def pkd_loss(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    r"""One minus the Pearson correlation of two feature maps, per channel.

    Each channel is standardised over batch and space. Half the mean squared
    difference of what remains is :math:`1 - r`: 0 for the same pattern,
    1 for unrelated ones, 2 for opposite ones.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        eps: Added to the deviation, for channels that are flat.

    Returns:
        Scalar in [0, 2], computed in float32.

    Reference:
        Cao et al., "PKD: General Distillation Framework for Object Detectors
        via Pearson Correlation Coefficient", NeurIPS 2022, arXiv:2207.02039.
        The authors use the unbiased deviation; here ``1 - r`` is exact.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 8, 4, 4)
        >>> pkd_loss(3 * x + 1, x).item() < 1e-6
        True
    """
    check_same_shape('PKDLoss', student, teacher)
    student, teacher = standardise(student, eps), standardise(teacher, eps)
    return F.mse_loss(student, teacher) / 2


@MODELS.register_module()
class PKDLoss(nn.Module):
    """Module form of :func:`pkd_loss`, times ``loss_weight``.

    Not kept:
        batch: A channel is normalised over the whole batch.
        border: Its mean and deviation are those of all cells, as published.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        return self.loss_weight * pkd_loss(student, teacher)
