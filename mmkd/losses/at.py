"""AT: look where the teacher looks."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_same_shape
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def at_loss(student: Tensor, teacher: Tensor, exponent: float = 2.0) -> Tensor:
    r"""Mean squared difference of two attention maps.

    The attention map of an image is :math:`mean_c |F|^{exponent}`, divided
    by its L2 norm over space. The mean is over images and locations. As the
    channels are averaged away, student and teacher may differ in them.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and size, without gradient,
            (N, C', H, W).
        exponent: Power of the activation, at least 1.

    Returns:
        Scalar in [0, 2 / (H * W)], computed in float32.

    Reference:
        Zagoruyko and Komodakis, "Paying More Attention to Attention",
        ICLR 2017, arXiv:1612.03928. The paper writes the norm of the
        difference; the mean of its square is what the authors' code trains.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 8, 4, 4)
        >>> at_loss(-3 * x, x).item() < 1e-12
        True
    """
    student = attention_map(student, exponent)
    teacher = attention_map(teacher, exponent)
    check_same_shape('ATLoss', student, teacher)
    return F.mse_loss(student, teacher)


def attention_map(feature: Tensor, exponent: float) -> Tensor:
    """Where a map is strong, with norm 1 over space, (N, 1, H, W)."""
    strength = as_float(feature).abs().pow(exponent).mean(1, keepdim=True)
    return F.normalize(strength.flatten(1)).view_as(strength)


@MODELS.register_module()
class ATLoss(nn.Module):
    """Module form of :func:`at_loss`, times ``loss_weight``.

    The default weight of 1000 is the ``--beta 1e+3`` of the authors' CIFAR-10
    runs. There is none for detection; as each map has norm 1, the loss falls
    with the number of its locations.

    Raises:
        ValueError: If ``exponent`` is below 1, where the derivative at 0 is
            infinite.

    Not kept:
        border: The norm of a map is that of all its cells, as published.
    """

    example: ClassVar[dict] = dict()

    def __init__(
        self, loss_weight: float = 1000.0, exponent: float = 2.0
    ) -> None:
        super().__init__()
        if not exponent >= 1:
            raise ValueError(
                f'ATLoss needs exponent >= 1, got exponent={exponent!r}. '
                f'The paper uses exponent=2.'
            )
        self.loss_weight = loss_weight
        self.exponent = exponent

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        return self.loss_weight * at_loss(student, teacher, self.exponent)
