"""ReviewKD: coarse levels of the student help to imitate the finer ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import (
    check_channels,
    check_positive,
    check_same_shape,
    check_statistics,
)
from mmkd.ops.masks import require_ground_truth, valid_mask
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

#: Cells in each direction that a map is pooled to, after the map itself.
POOLED = (4, 2, 1)


def hcl_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None
) -> Tensor:
    r"""Hierarchical context loss: the error of a map and of its means.

    .. math:: \frac{\sum_k 2^{-k} \,
        mean (P_k(S) - P_k(T))^2}{\sum_k 2^{-k}}

    :math:`P_0` is the map itself; the next ones average it to 4x4, 2x2 and
    one cell, as far as these are smaller than its shorter side.

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        mask: 1 where a cell counts, 0 elsewhere, (N, 1, H, W); all if None.
            A pooled cell is the mean of those that count and takes part if
            there is one.

    Returns:
        Scalar >= 0, computed in float32.

    Reference:
        As :class:`ReviewKDLoss`.

    Example:
        >>> x = torch.zeros(2, 8, 16, 16)
        >>> hcl_loss(x + 3, x).item()
        9.0
    """
    check_same_shape('ReviewKDLoss', student, teacher)
    difference = as_float(student) - as_float(teacher)
    if mask is None:
        mask = torch.ones_like(difference[:, :1])
    # Pooling is linear: the difference is pooled once for both.
    total, weight, weights = _error(difference, mask), 1.0, 1.0
    for size in POOLED:
        if size >= min(difference.shape[-2:]):
            continue
        weight /= 2
        weights += weight
        share = F.adaptive_avg_pool2d(mask, size)
        pooled = F.adaptive_avg_pool2d(mask * difference, size)
        pooled = pooled / torch.where(share > 0, share, 1)
        total = total + weight * _error(pooled, (share > 0).to(pooled))
    return total / weights


def _error(difference: Tensor, mask: Tensor) -> Tensor:
    """Mean square over channels and the cells that count."""
    error = difference.square().mean(1, keepdim=True)
    return (mask * error).sum() / mask.sum().clamp(min=1)


class AttentionFusion(nn.Module):
    r"""A level's map, mixed with what the coarser levels hand down.

    .. math:: F = z_1 \odot x + z_2 \odot up(F'), \quad
        (z_1, z_2) = \sigma(conv_{1 \times 1}[x, up(F')]), \quad
        x = BN(conv_{1 \times 1}(S))

    The fused map F goes on to the finer level; what is compared with the
    teacher is :math:`BN(conv_{3 \times 3}(F))`. The coarsest level has no
    F' and takes x as it is.

    Args:
        in_channels: Channels of the student's map.
        mid_channels: Channels of F.
        out_channels: Channels of the teacher's map.
        fuse: Whether there is a coarser level.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        fuse: bool,
    ) -> None:
        super().__init__()
        self.enter = _conv(in_channels, mid_channels, kernel_size=1)
        self.leave = _conv(mid_channels, out_channels, kernel_size=3)
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None

    def forward(
        self, feature: Tensor, coarser: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The map to compare and the one to hand down, at the level's size."""
        fused = self.enter(feature)
        if self.attention is not None:
            coarser = F.interpolate(coarser, fused.shape[-2:], mode='nearest')
            both = torch.cat([fused, coarser], 1)
            own, other = self.attention(both).sigmoid().split(1, dim=1)
            fused = own * fused + other * coarser
        return self.leave(fused), fused


def _conv(
    in_channels: int, out_channels: int, kernel_size: int
) -> nn.Sequential:
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=False,
    )
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


@MODELS.register_module()
class ReviewKDLoss(nn.Module):
    """Knowledge review: fused maps of the student against the teacher's.

    From the coarsest level to the finest, :class:`AttentionFusion` mixes a
    level with what the coarser ones hand down; :func:`hcl_loss` compares each
    result with the teacher's map, and the levels are summed. The fusions
    learn along and bring the student to the teacher's channels.

    Cells of the padded border are in no mean, though the convolutions see
    them; cells in ignored boxes count, as nothing here depends on what an
    object is. Without a ground truth all cells count.

    Args:
        in_channels: Channels of the student's levels, the finest first.
        out_channels: Channels of the teacher's, likewise; as the student's if
            None.
        mid_channels: Channels of the maps handed down.
        loss_weight: Factor of the sum. The authors' RetinaNet and this
            default take 1.
        keep_padding: Let cells of the padded border count, as in the
            authors' code, which has no notion of them.

    Raises:
        ValueError: If the lists of channels differ in length.

    Not kept:
        equality: The student's maps are fused by convolutions.
        batch: The mean is that over the cells of the whole batch.
        border: The convolutions that fuse maps reach over it.

    Reference:
        Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021,
        arXiv:2104.09044. The authors' code was read (for CIFAR-100, and their
        RetinaNet), not the paper. It skips pooled sizes by the height alone;
        here the shorter side decides.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(in_channels=(8, 8), mid_channels=8)

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int] | None = None,
        mid_channels: int = 256,
        loss_weight: float = 1.0,
        keep_padding: bool = False,
    ) -> None:
        super().__init__()
        check_positive('ReviewKDLoss', mid_channels=mid_channels)
        out_channels = in_channels if out_channels is None else out_channels
        if len(in_channels) != len(out_channels):
            raise ValueError(
                f'ReviewKDLoss compares level by level, got '
                f'{len(in_channels)} in_channels, {tuple(in_channels)}, and '
                f'{len(out_channels)} out_channels, {tuple(out_channels)}. '
                f'Give both one entry a level.'
            )
        self.in_channels = tuple(in_channels)
        self.out_channels = tuple(out_channels)
        self.loss_weight = loss_weight
        self.keep_padding = keep_padding
        coarsest = len(self.in_channels) - 1
        self.fusions = nn.ModuleList(
            AttentionFusion(one, mid_channels, other, fuse=level < coarsest)
            for level, (one, other) in enumerate(
                zip(self.in_channels, self.out_channels)
            )
        )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> Tensor:
        self._check_levels(student, teacher)
        if gt is not None:
            gt = require_ground_truth('ReviewKDLoss', gt, student[0])
        total = 0.0
        for one, other in zip(self.review(student), teacher):
            total = total + hcl_loss(one, other, self._mask(gt, other))
        return self.loss_weight * total

    def review(self, student: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The student's maps, each with the coarser ones in it.

        Args:
            student: Maps, the finest first, (N, C, H, W) each.

        Returns:
            As many maps with the teacher's channels, the finest first.
        """
        results: list[Tensor] = []
        handed = None
        with full_precision(student[0]):
            for fusion, one in zip(self.fusions[::-1], student[::-1]):
                result, handed = fusion(as_float(one), handed)
                results.insert(0, result)
        return tuple(results)

    def _mask(self, gt: GroundTruth | None, feature: Tensor) -> Tensor | None:
        if gt is None:
            return None
        return valid_mask(
            gt,
            tuple(feature.shape[-2:]),
            self.keep_padding,
            keep_ignored=True,
        )

    def _check_levels(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        levels = len(self.fusions)
        if not len(student) == len(teacher) == levels:
            raise ValueError(
                f'ReviewKDLoss was built for {levels} levels, got '
                f'{len(student)} maps of the student and {len(teacher)} of '
                f'the teacher. Give in_channels one entry a level, and name '
                f'the levels of the term.'
            )
        for level, (one, other) in enumerate(zip(student, teacher)):
            check_channels('ReviewKDLoss', one, self.in_channels[level])
            check_channels('ReviewKDLoss', other, self.out_channels[level])
        check_statistics('ReviewKDLoss', self.training, student)
