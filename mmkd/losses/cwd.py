"""CWD: each channel is a distribution over space."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive, check_same_shape
from mmkd.ops.numeric import as_float, standardise
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def cwd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    normalise: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    r"""Divergence of two maps whose channels are softmaxed over space.

    .. math:: \frac{\tau^2}{N C} \sum_{n,c,i} p^T \log (p^T / p^S), \quad
        p = softmax_i(F / \tau)

    It serves feature maps and class logits (A * K channels) alike, and
    ignores an offset of each channel.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        temperature: The higher, the wider the region that counts.
        normalise: Standardise each channel of both over batch and space
            first, without scale and shift of its own.
        eps: Added to the deviation by ``normalise``.

    Returns:
        Scalar >= 0, computed in float32.

    Reference:
        Shu et al., "Channel-wise Knowledge Distillation for Dense
        Prediction", ICCV 2021, arXiv:2011.13256.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 8, 4, 4)
        >>> cwd_loss(x + 3, x).item() < 1e-6
        True
    """
    check_same_shape('CWDLoss', student, teacher)
    if normalise:
        student = standardise(student, eps)
        teacher = standardise(teacher, eps)
    student = as_float(student).flatten(2) / temperature  # N, C, H * W
    teacher = as_float(teacher).flatten(2) / temperature
    divergence = F.kl_div(
        student.log_softmax(2),
        teacher.log_softmax(2),
        reduction='sum',
        log_target=True,
    )
    images, channels = student.shape[:2]
    return temperature**2 / (images * channels) * divergence


@MODELS.register_module()
class CWDLoss(nn.Module):
    """Module form of :func:`cwd_loss`, times ``loss_weight``.

    Settings in use, all with temperature 1: MMRazor's FPN levels take weight
    10; PaddleDetection takes 5 on class logits and neck; MMYOLO's RTMDet
    takes 1 with ``normalise=True`` on three levels.

    Not kept:
        border: A channel's softmax runs over all cells, as published.
    """

    example: ClassVar[dict] = dict()

    def __init__(
        self,
        loss_weight: float = 1.0,
        temperature: float = 1.0,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        check_positive('CWDLoss', temperature=temperature)
        self.loss_weight = loss_weight
        self.temperature = temperature
        self.normalise = normalise

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        return self.loss_weight * cwd_loss(
            student, teacher, self.temperature, self.normalise
        )
