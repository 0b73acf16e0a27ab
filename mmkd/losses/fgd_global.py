"""FGD, global part: imitate what the whole map adds to each location."""

from __future__ import annotations

from typing import ClassVar

from mmcv.cnn import ContextBlock
from torch import Tensor, nn

from mmkd.checks import check_channels, check_same_shape
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def fgd_global_loss(
    student: Tensor,
    teacher: Tensor,
    student_context: Tensor,
    teacher_context: Tensor,
    difference: Tensor | None = None,
) -> Tensor:
    r"""Squared error of two maps, to each of which a context was added.

    .. math:: \frac{1}{N} \sum (D + A)^2 = \frac{1}{N} \Big( \sum D^2
        + 2 \sum A \sum_{hw} D + H W \sum A^2 \Big)

    with :math:`D = S - T` and :math:`A` the difference of the contexts. The
    right side needs no second map of the full size.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        student_context, teacher_context: What is added to each location,
            (N, C, 1, 1).
        difference: ``student - teacher`` where it is at hand already.

    Returns:
        Scalar, computed in float32.

    Example:
        >>> import torch
        >>> x, a = torch.randn(2, 3, 4, 4), torch.ones(2, 3, 1, 1)
        >>> round(fgd_global_loss(x, x, 2 * a, a).item())  # 3 * 4 * 4
        48
    """
    check_same_shape('FGDGlobalLoss', student, teacher)
    if difference is None:
        difference = as_float(student) - as_float(teacher)
    added = student_context - teacher_context
    cells = difference.shape[-2] * difference.shape[-1]
    total = (
        difference.square().sum()
        + 2 * (added * difference.sum((2, 3), keepdim=True)).sum()
        + cells * added.square().sum()
    )
    return total / len(difference)


@MODELS.register_module()
class FGDGlobalLoss(nn.Module):
    r"""Relation part of FGD.

    .. math:: \frac{w}{N} \|R_S(S) - R_T(T)\|^2, \quad R(F) = F + W_2
        ReLU(LN(W_1 \sum_{hw} softmax_{hw}(W_k F) F))

    R is GCNet's context block with C / 2 inner channels, one for each side,
    and both learn along: the teacher's map is constant, its block is not.
    :math:`W_2` starts at zero, so R starts as the identity.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        loss_weight: The paper's lambda. Published: 5e-6 for RetinaNet, GFL
            and SOLO; :class:`mmkd.losses.fgd.FGDLoss` lists all.

    Raises:
        ValueError: If there are fewer than two channels.

    Not kept:
        border: The context is that of all cells, as published.

    Reference:
        Yang et al., "Focal and Global Knowledge Distillation for Detectors",
        CVPR 2022, arXiv:2111.11837. The block: Cao et al., "GCNet: Non-local
        Networks Meet Squeeze-Excitation Networks and Beyond", ICCVW 2019,
        arXiv:1904.11492.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(self, channels: int, loss_weight: float = 5e-6) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(
                f'FGDGlobalLoss halves the channels inside its blocks and '
                f'needs at least 2, got channels={channels}.'
            )
        self.channels = channels
        self.loss_weight = loss_weight
        self.student_block = ContextBlock(channels, ratio=1 / 2)
        self.teacher_block = ContextBlock(channels, ratio=1 / 2)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        gt: GroundTruth | None = None,
        difference: Tensor | None = None,
    ) -> Tensor:
        check_same_shape('FGDGlobalLoss', student, teacher)
        check_channels('FGDGlobalLoss', teacher, self.channels)
        student, teacher = as_float(student), as_float(teacher)
        with full_precision(student):
            return self.loss_weight * fgd_global_loss(
                student,
                teacher,
                _context(self.student_block, student),
                _context(self.teacher_block, teacher),
                difference,
            )


def _context(block: ContextBlock, feature: Tensor) -> Tensor:
    """What the block adds to each location, (N, C, 1, 1)."""
    # The pooling takes views, which a cropped map does not allow.
    return block.channel_add_conv(block.spatial_pool(feature.contiguous()))
