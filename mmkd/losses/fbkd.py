"""FBKD: imitate where attention is, and how locations relate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from mmcv.cnn import NonLocal2d
from torch import Tensor, nn

from mmkd.checks import (
    check_channels,
    check_positive,
    check_same_shape,
    check_statistics,
)
from mmkd.ops.attention import channel_attention, spatial_attention
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def attention_mask(
    student: Tensor, teacher: Tensor, temperature: float = 0.5
) -> Tensor:
    r"""Spatial times channel attention, each the mean of both models'.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape.
        temperature: The lower, the sharper.

    Returns:
        Weight of each element, without gradient, (N, C, H, W).
    """
    student, teacher = student.detach(), teacher.detach()
    spatial = spatial_attention(student, temperature)
    spatial = (spatial + spatial_attention(teacher, temperature)) / 2
    channel = channel_attention(student, temperature)
    channel = (channel + channel_attention(teacher, temperature)) / 2
    return spatial * channel


def distance(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None
) -> Tensor:
    r""":math:`\sqrt{\sum M (S - T)^2}` over the whole batch, M = 1 if None.

    The derivative at equality, where the root has none, is zero.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> distance(x, torch.tensor([[3.0, 4.0]])).item()
        5.0
    """
    difference = student - teacher
    if mask is not None:
        difference = difference * mask.sqrt()
    return torch.linalg.vector_norm(difference)


def non_local(channels: int, reduction: int, pool_stride: int) -> NonLocal2d:
    r"""Each location plus what all others, weighted by affinity, say to it.

    .. math:: R(x)_i = x_i + BN(W \frac{1}{J} \sum_j
        (\theta x_i)^\top (\phi x)_j (g x)_j)

    where j runs over the J max-pooled cells. It starts as the identity: the
    scale of the last norm is zero.

    Args:
        channels: Channels of the map.
        reduction: Divides the channels of the embeddings.
        pool_stride: Cells that are pooled into one in each direction, of
            which a window at the border may have fewer.
    """
    block = NonLocal2d(
        channels,
        reduction=reduction,
        mode='dot_product',
        norm_cfg=dict(type='BN'),
    )
    # With ceil_mode a map smaller than the stride still has a cell.
    pool = nn.MaxPool2d(pool_stride, ceil_mode=True)
    block.g = nn.Sequential(block.g, pool)
    block.phi = nn.Sequential(block.phi, pool)
    return block


@MODELS.register_module()
class FBKDLoss(nn.Module):
    r"""Attention-guided and non-local distillation of one level.

    Four distances, each the root of a sum over the batch:

    - ``feature``: :math:`\sqrt{\sum M (\phi(S) - T)^2}` with :math:`\phi` a
      1x1 convolution and M of :func:`attention_mask`;
    - ``channel``: between the means over space, through a linear layer;
    - ``spatial``: between the means over channels, through a 3x3 convolution;
    - ``relation``: between the outputs of a :func:`non_local` block on either
      side, the student's through a 1x1 convolution.

    All four layers and both blocks learn along; the teacher gets no gradient
    through its block. The paper weights features by both masks. MMRazor leaves
    the channel mask out, as do copies of the authors' code for two-stage
    detectors; those for one-stage detectors have both. Here both count.

    The affinity of ``relation`` has :math:`(HW)^2 / stride^2` entries an image
    and side: 0.28 GB on a P2 of 200x336 cells with stride 8.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        feature_weight: Factor of ``feature``.
        attention_weight: Factor of ``channel`` and of ``spatial``.
        relation_weight: Factor of ``relation``.
        temperature: Of the attention masks.
        pool_stride: Of the non-local blocks: one for all levels, or one a
            level, the finest first. MMRazor uses (8, 4, 2, 2) on P2 to P5.
        reduction: Of the blocks' inner channels, likewise. MMRazor uses
            (4, 4, 2, 2).
        loss_weight: Factor of all parts.
        level_index: Level this loss is for, 0 is the finest. The term that
            builds one loss a level gives it.

    Raises:
        ValueError: If ``pool_stride`` or ``reduction`` has no entry for the
            level.

    Not kept:
        equality: The student's map passes a convolution of its own.
        batch: The norm is that of the whole batch.
        border: Attention and relations span the map, as published.

    Reference:
        Zhang and Ma, "Improve Object Detection with Feature-based Knowledge
        Distillation: Towards Accurate and Efficient Detectors", ICLR 2021,
        https://openreview.net/forum?id=uKhGRvM8QNH. The default weights and
        temperature are MMRazor's for two-stage detectors. For one-stage ones
        the paper is quoted with 4e-4, 2e-2, 4e-4 and temperature 0.5; for
        two-stage ones with the default weights and temperature 0.1.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        feature_weight: float = 7e-5,
        attention_weight: float = 4e-3,
        relation_weight: float = 7e-5,
        temperature: float = 0.5,
        pool_stride: int | Sequence[int] = 2,
        reduction: int | Sequence[int] = 2,
        loss_weight: float = 1.0,
        level_index: int = 0,
    ) -> None:
        super().__init__()
        pool_stride = _at_level('pool_stride', pool_stride, level_index)
        reduction = _at_level('reduction', reduction, level_index)
        check_positive(
            'FBKDLoss',
            temperature=temperature,
            pool_stride=pool_stride,
            reduction=reduction,
        )
        self.channels = channels
        self.feature_weight = feature_weight
        self.attention_weight = attention_weight
        self.relation_weight = relation_weight
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.adapt_feature = nn.Conv2d(channels, channels, 1)
        self.adapt_channel = nn.Linear(channels, channels)
        self.adapt_spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.adapt_relation = nn.Conv2d(channels, channels, 1)
        self.student_relation = non_local(channels, reduction, pool_stride)
        self.teacher_relation = non_local(channels, reduction, pool_stride)

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> dict[str, Tensor]:
        check_same_shape('FBKDLoss', student, teacher)
        check_channels('FBKDLoss', teacher, self.channels)
        check_statistics('FBKDLoss', self.training, [student])
        student, teacher = as_float(student), as_float(teacher)
        with full_precision(student):
            parts = dict(
                feature=self.feature_weight * self._feature(student, teacher),
                channel=self.attention_weight
                * self._channel(student, teacher),
                spatial=self.attention_weight
                * self._spatial(student, teacher),
                relation=self.relation_weight
                * self._relation(student, teacher),
            )
        return {name: self.loss_weight * part for name, part in parts.items()}

    def _feature(self, student: Tensor, teacher: Tensor) -> Tensor:
        mask = attention_mask(student, teacher, self.temperature)
        return distance(self.adapt_feature(student), teacher, mask)

    def _channel(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distance(
            self.adapt_channel(student.mean((2, 3))), teacher.mean((2, 3))
        )

    def _spatial(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distance(
            self.adapt_spatial(student.mean(1, keepdim=True)),
            teacher.mean(1, keepdim=True),
        )

    def _relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distance(
            self.adapt_relation(self.student_relation(student)),
            self.teacher_relation(teacher),
        )


def _at_level(name: str, setting: int | Sequence[int], level: int) -> int:
    if isinstance(setting, int):
        return setting
    if level < len(setting):
        return setting[level]
    raise ValueError(
        f'FBKDLoss needs {name} for level {level}, got {len(setting)} '
        f'entries, {tuple(setting)}. Give one for each level from the finest '
        f'on, or a single number.'
    )
