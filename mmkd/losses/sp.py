"""SP: objects are as similar to each other as they are for the teacher."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.ops.numeric import full_precision, zero_of
from mmkd.ops.regions import region_vectors
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of two similarity matrices.

    .. math:: \frac{1}{M^2} \| \hat G_S - \hat G_T \|_F^2, \quad
        G = X X^\top

    where each row of the Gram matrix is divided by its L2 norm.

    Args:
        student: Vectors of M samples, (M, C).
        teacher: Vectors of the same samples, without gradient, (M, C').

    Returns:
        Scalar in [0, 4 / M] that ignores scale and rotation of either side;
        zero for fewer than two samples.

    Reference:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation",
        ICCV 2019, arXiv:1907.09682.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 8)
        >>> sp_loss(3 * x, x).item() < 1e-6
        True
    """
    if len(student) < 2:
        return zero_of(student)
    return F.mse_loss(_similarities(student), _similarities(teacher))


def _similarities(vectors: Tensor) -> Tensor:
    """Gram matrix with rows of norm 1, (M, M)."""
    with full_precision(vectors):
        return F.normalize(vectors @ vectors.T)


@MODELS.register_module()
class SPLoss(nn.Module):
    """Similarity of the batch's objects, preserved from the teacher.

    The samples are the ground-truth boxes of all images together, each the
    mean of the map over its box. Similarities need no adapter, so student and
    teacher may differ in channels and size. Fewer than two boxes cost
    nothing.

    Args:
        loss_weight: Factor of :func:`sp_loss`. Classification takes 3000 for
            batches of 128 images; as the loss falls with the number of
            samples, a batch with ten boxes needs far less. The default is
            ours, not a published one.
        output_size: Bins of RoIAlign in each direction.

    Not kept:
        batch: Objects of all images are related to each other.

    Reference:
        Tung and Mori, arXiv:1907.09682; the regions are ours.
    """

    example: ClassVar[dict] = dict()

    def __init__(self, loss_weight: float = 1.0, output_size: int = 7) -> None:
        super().__init__()
        check_positive('SPLoss', output_size=output_size)
        self.loss_weight = loss_weight
        self.output_size = output_size

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        student, teacher = (
            region_vectors(one, gt, self.output_size)
            for one in (student, teacher)
        )
        return self.loss_weight * sp_loss(student, teacher)
