"""Mimic: the student's map becomes the teacher's."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_name, check_same_shape
from mmkd.ops.numeric import as_float, unit
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

REDUCTIONS = ('mean', 'sum')
DISTANCES = dict(
    squared=F.mse_loss, absolute=F.l1_loss, smooth=F.smooth_l1_loss
)


def mimic_loss(
    student: Tensor,
    teacher: Tensor,
    reduction: str = 'mean',
    normalise: bool = False,
    distance: str = 'squared',
) -> Tensor:
    r"""Difference of two maps, squared: :math:`(S - T)^2`.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        reduction: ``'mean'`` over all elements, or ``'sum'`` over all
            elements, divided by the N images.
        normalise: Divide the vector at each location by its length over the
            channels first. The sum over channels is then
            :math:`2 - 2\cos(S, T)`, which ignores scale.
        distance: ``'squared'``, ``'absolute'``, :math:`|S - T|`, or
            ``'smooth'``, half the square of a difference below 1 and of
            others the absolute one less 1/2, as of offsets of boxes.

    Returns:
        Scalar, computed in float32.

    Reference:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
        arXiv:1412.6550. Their hint loss is half of the sum.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 3, 4, 4)
        >>> mimic_loss(x + 2, x), mimic_loss(x + 2, x, reduction='sum')
        (tensor(4.), tensor(192.))
    """
    check_same_shape('MimicLoss', student, teacher)
    check_name('MimicLoss', 'reduction', reduction, REDUCTIONS)
    check_name('MimicLoss', 'distance', distance, DISTANCES)
    student, teacher = as_float(student), as_float(teacher)
    if normalise:
        student, teacher = unit(student, dim=1), unit(teacher, dim=1)
    loss = DISTANCES[distance](student, teacher, reduction=reduction)
    return loss / len(student) if reduction == 'sum' else loss


@MODELS.register_module()
class MimicLoss(nn.Module):
    """Module form of :func:`mimic_loss`, times ``loss_weight``.

    The weight has no published default for whole maps: it depends on the
    scale of the teacher's features unless ``normalise`` is set.

    Not kept:
        border: All cells count, as published.
    """

    example: ClassVar[dict] = dict()

    def __init__(
        self,
        loss_weight: float = 1.0,
        reduction: str = 'mean',
        normalise: bool = False,
        distance: str = 'squared',
    ) -> None:
        super().__init__()
        check_name('MimicLoss', 'reduction', reduction, REDUCTIONS)
        check_name('MimicLoss', 'distance', distance, DISTANCES)
        self.loss_weight = loss_weight
        self.reduction = reduction
        self.normalise = normalise
        self.distance = distance

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        return self.loss_weight * mimic_loss(
            student, teacher, self.reduction, self.normalise, self.distance
        )
