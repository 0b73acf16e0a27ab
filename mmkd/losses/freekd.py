"""FreeKD: imitate details of the map where frequency prompts point at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.checks import check_channels, check_positive, check_same_shape
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float, zero_of
from mmkd.ops.tokens import mask_overlap, token_masks
from mmkd.ops.wavelets import haar, unhaar
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


@MODELS.register_module()
class FreeKDLoss(nn.Module):
    r"""Absolute difference of the wavelet bands under masks of prompts.

    .. math:: w \sum_j \frac{1}{P} \sum_p mean(M_{jp} \, |B_j(S) - B_j(T)|)

    :math:`B_j` are the three bands of columns, rows and diagonals of scale j
    of Haar's transform. A prompt p is a direction in the space of channels; it
    has a mask for each scale, :math:`\sigma(p^\top \sum B_j(T))`, of the sum
    of the three. The coarse band is left to a distance of the maps themselves:
    add :class:`mmkd.losses.mimic.MimicLoss` as a term of its own.

    Prompts are not trained by this distance. They learn by :meth:`reveal`: the
    teacher's map is put together again from bands times the sum of their
    masks, and the teacher's own loss on it must be low, while masks overlap
    little. :class:`mmkd.terms.learned_mask.LearnedMaskTerm` sees to that;
    without it the masks stay at one half.

    Cells of the padded border do not count.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        prompts: Number of prompts of each band. In the authors' code: 6.
        scales: How often the coarse band is split again. Published: 3.
        loss_weight: Outer factor w. Published: 1, beside a mean squared error
            of weight 5.

    Not kept:
        batch: The sum is divided by what counts in the whole batch.
        border: Wavelets at the border reach over it.

    Reference:
        Zhang et al., "FreeKD: Knowledge Distillation via Semantic Frequency
        Prompt", CVPR 2024, arXiv:2311.12079. The abstract and the authors'
        code (https://github.com/Gumpest/FreeKD) were read for facts, and a
        reader's notes on the paper. The position-aware weights of channels
        that the paper describes are not in that code, and not here. It knows
        no border.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        prompts: int = 6,
        scales: int = 3,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('FreeKDLoss', prompts=prompts, scales=scales)
        self.channels = channels
        self.loss_weight = loss_weight
        self.low = nn.Parameter(0.01 * torch.randn(prompts, channels))
        self.high = nn.Parameter(0.01 * torch.randn(scales, prompts, channels))

    def masks(self, highs: Sequence[Tensor]) -> list[Tensor]:
        """Masks of each scale, (N, P, h, w)."""
        return [
            token_masks(bands.sum(2), prompts)
            for bands, prompts in zip(highs, self.high)
        ]

    def reveal(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What the masks leave of the teacher's map, and their overlap.

        Args:
            teacher: Map of one level, (N, C, H, W).

        Returns:
            Map of the same shape and a scalar, summed over the coarse band
            and the scales, both with a gradient to the prompts.
        """
        check_channels('FreeKDLoss', teacher, self.channels)
        low, highs = haar(teacher, len(self.high))
        coarse, masks = token_masks(low, self.low), self.masks(highs)
        overlap = sum(mask_overlap(one) for one in (coarse, *masks))
        left = [
            bands * one.sum(1)[:, None, None]
            for bands, one in zip(highs, masks)
        ]
        low = low * coarse.sum(1, keepdim=True)
        return unhaar(low, left, teacher.shape[-2:]), overlap

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        check_same_shape('FreeKDLoss', student, teacher)
        check_channels('FreeKDLoss', teacher, self.channels)
        with torch.no_grad():
            _, highs = haar(teacher, len(self.high))
            masks = [one.mean(1, keepdim=True) for one in self.masks(highs)]
        # The transform is linear.
        _, gaps = haar(as_float(student) - as_float(teacher), len(self.high))
        loss = 0.0
        for mask, gap in zip(masks, gaps):
            error = gap.abs().mean((1, 2))[:, None]  # N, 1, h, w
            weight = equal_weight(gt, mask)
            total = (weight * mask * error).sum()
            loss = loss + total / weight.sum().clamp(min=1)
        # DDP waits for a gradient of every weight.
        idle = zero_of(self.low) + zero_of(self.high)
        return self.loss_weight * loss + idle
