"""FGD, focal part: imitate where and in which channels the teacher looks."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive, check_same_shape
from mmkd.ops.attention import channel_attention, spatial_attention
from mmkd.ops.masks import (
    background_mask,
    foreground_mask,
    require_ground_truth,
)
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def fgd_focal_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float = 0.5,
    difference: Tensor | None = None,
) -> dict[str, Tensor]:
    r"""Squared error under masks and the teacher's attention.

    With the attentions :math:`A_s` over space and :math:`A_c` over channels:

    .. math::
        foreground &= \frac{1}{N} \sum M_{fg} A_s^T A_c^T (S - T)^2 \\
        background &= \frac{1}{N} \sum M_{bg} A_s^T A_c^T (S - T)^2 \\
        attention &= \frac{1}{N}
            (\|A_s^S - A_s^T\|_1 + \|A_c^S - A_c^T\|_1)

    Masks and :math:`A_s` do not depend on the channel, so the channels are
    summed first: one map of the full size is kept for the backward pass.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        foreground, background: Weight of each cell, (N, 1, H, W).
        temperature: Of the attentions; the lower, the sharper.
        difference: ``student - teacher`` where it is at hand already.

    Returns:
        The parts by name, computed in float32.

    Reference:
        Yang et al., "Focal and Global Knowledge Distillation for Detectors",
        CVPR 2022, arXiv:2111.11837.

    Example:
        >>> import torch
        >>> flat = torch.ones(1, 2, 4, 4)
        >>> everywhere = torch.full((1, 1, 4, 4), 1 / 16)
        >>> parts = fgd_focal_loss(flat + 1, flat, everywhere, 0 * everywhere)
        >>> {name: part.item() for name, part in parts.items()}
        {'foreground': 2.0, 'background': 0.0, 'attention': 0.0}
    """
    check_same_shape('FGDFocalLoss', student, teacher)
    student, teacher = as_float(student), as_float(teacher)
    if difference is None:
        difference = student - teacher
    spatial = spatial_attention(teacher, temperature)
    channel = channel_attention(teacher, temperature)
    with full_precision(student):
        error = channel.flatten(1)[:, None] @ difference.square().flatten(2)
    error = spatial * error.view_as(spatial)  # N, 1, H, W
    attention = F.l1_loss(
        spatial_attention(student, temperature), spatial, reduction='sum'
    ) + F.l1_loss(
        channel_attention(student, temperature), channel, reduction='sum'
    )
    parts = dict(
        foreground=(foreground * error).sum(),
        background=(background * error).sum(),
        attention=attention,
    )
    return {name: part / len(student) for name, part in parts.items()}


@MODELS.register_module()
class FGDFocalLoss(nn.Module):
    r"""Foreground, background and attention part of FGD.

    Cells in a box weigh one over the cells of the box, the others one over
    their number, see :mod:`mmkd.ops.masks`. The default weights are those
    published for RetinaNet, GFL and SOLO; :class:`mmkd.losses.fgd.FGDLoss`
    lists them all.

    Args:
        foreground_weight: The paper's alpha.
        background_weight: The paper's beta.
        attention_weight: The paper's gamma.
        temperature: Of the attentions; the lower, the sharper.
        keep_padding: Let cells of the padded border count, as in the
            authors' code, which has no notion of them.
        keep_ignored: Let cells in ignored boxes count, likewise.
        loss_weight: Factor of all parts.

    Not kept:
        border: Attention is that over all cells, as published.

    Reference:
        As :func:`fgd_focal_loss`.
    """

    example: ClassVar[dict] = dict()

    def __init__(
        self,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        temperature: float = 0.5,
        keep_padding: bool = False,
        keep_ignored: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('FGDFocalLoss', temperature=temperature)
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.attention_weight = attention_weight
        self.temperature = temperature
        self.keep_padding = keep_padding
        self.keep_ignored = keep_ignored
        self.loss_weight = loss_weight

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        gt: GroundTruth | None = None,
        difference: Tensor | None = None,
    ) -> dict[str, Tensor]:
        check_same_shape('FGDFocalLoss', student, teacher)
        gt = require_ground_truth('FGDFocalLoss', gt, student)
        place = (
            gt,
            tuple(student.shape[-2:]),
            self.keep_padding,
            self.keep_ignored,
        )
        foreground = foreground_mask(*place)
        parts = fgd_focal_loss(
            student,
            teacher,
            foreground,
            background_mask(*place, foreground=foreground),
            self.temperature,
            difference,
        )
        weights = dict(
            foreground=self.foreground_weight,
            background=self.background_weight,
            attention=self.attention_weight,
        )
        return {
            name: self.loss_weight * weights[name] * part
            for name, part in parts.items()
        }
