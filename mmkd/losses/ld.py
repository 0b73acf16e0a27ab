"""LD: the edges of boxes as distributions, imitated where it counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive, check_same_shape
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

#: Left, top, right and bottom.
EDGES = 4


def edge_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 10.0, anchors=1
) -> Tensor:
    r"""Divergence of the teacher's edge distributions from the student's.

    .. math:: \frac{\tau^2}{4 B} \sum_{e=1}^{4} \sum_{b=1}^{B}
              p^T_{eb} \log \frac{p^T_{eb}}{p^S_{eb}}, \qquad
              p_e = \mathrm{softmax}_b(z_e / \tau)

    Args:
        student: Logits of one level, (N, A·4·B, H, W), B bins an edge.
        teacher: Of the same shape, without gradient.
        temperature: :math:`\tau`.
        anchors: A.

    Returns:
        (N, A, H, W), computed in float32.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 4 * 17, 2, 2)
        >>> edge_divergence(x, x).abs().max().item() < 1e-5
        True
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f'LDLoss compares distributions of box edges, got '
            f'{student.shape[1]} channels of the student and '
            f'{teacher.shape[1]} of the teacher. Take a teacher whose head '
            f'has them with the same reg_max, or a term on features.'
        )
    check_same_shape('LDLoss', student, teacher)
    images, channels, height, width = student.shape
    if channels % (EDGES * anchors):
        raise ValueError(
            f'LDLoss compares distributions of four edges, so the channels '
            f'are a multiple of {EDGES * anchors}; got {channels}. Tap the '
            f'box distributions of a GFL head: tap="bbox_head", output=1.'
        )
    shape = (images, anchors, EDGES, -1, height, width)
    own, other = (
        F.log_softmax(as_float(one).reshape(shape) / temperature, dim=3)
        for one in (student, teacher)
    )
    divergence = (other.exp() * (other - own)).mean((2, 3))
    return temperature**2 * divergence


@MODELS.register_module()
class LDLoss(nn.Module):
    r"""Edge distributions of all levels, weighted by ``weight``.

    .. math:: \frac{\sum_i w_i D_i}{\max(1, \sum_i w_i)}

    over the anchors i of all levels and images, D the
    :func:`edge_divergence`. Called without weights, every cell counts alike
    that is not border.

    Args:
        temperature: Of the distributions. Published: 10.
        average: Divide by the sum of the weights, as the box losses of GFL
            do. False gives the sum, as the authors' code does: the published
            weights belong to it, and to two images a GPU.
        loss_weight: Factor. Published for the sum over positives: 0.25.

    Raises:
        ValueError: If the channels are no four distributions.

    Not kept:
        batch: The sum is divided by the weights of the whole batch.

    Reference:
        Zheng et al., "Localization Distillation for Dense Object Detection",
        CVPR 2022, arXiv:2102.12252, mean over bins and quarter as in
        MMDetection's LDHead, which was read; the paper was not. With
        ``weight=dict(type='mmkd.PositiveWeight')`` it is the main region, with
        ``mmkd.ValuableWeight`` the valuable one, which the authors divide by
        16 where the main one is divided by 4: a ``loss_weight`` of 0.0625.
    """

    scope = 'levels'

    def __init__(
        self,
        temperature: float = 10.0,
        average: bool = True,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('LDLoss', temperature=temperature)
        self.temperature, self.average = temperature, average
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
        weight: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if weight is None:
            weight = [equal_weight(gt, one) for one in student]
        loss = count = 0.0
        for one, other, share in zip(student, teacher, weight):
            share = as_float(share)
            divergence = edge_divergence(
                one, other, self.temperature, share.shape[1]
            )
            loss = loss + (share * divergence).sum()
            count = count + share.sum()
        if self.average:
            loss = loss / count.clamp(min=1)
        return self.loss_weight * loss
