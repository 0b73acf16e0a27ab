"""FreeKD: imitate details of the map where frequency prompts point at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.checks import (
    check_channels,
    check_name,
    check_positive,
    check_same_shape,
)
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float, full_precision, zero_of
from mmkd.ops.tokens import mask_overlap, token_masks
from mmkd.ops.wavelets import haar, unhaar
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth

#: Whose map says how much each channel counts.
POSITIONS = ('teacher', 'student')
#: Channels to hidden units of the gate, of which there are at least so many.
REDUCTION, HIDDEN = 16, 8


def coarse_attention(feature: Tensor, scales: int) -> Tensor:
    r"""What each channel, seen coarsely, finds in the channels as they are.

    .. math:: A_{cd} = softmax_d
        \frac{\langle \psi(F)_c, F_d \rangle}{\|\psi(F)_c\| \|F_d\|}

    :math:`\psi` puts the mean of a block of :math:`2^{scales}` rows and
    columns in each of its cells. A channel whose objects are as large as
    blocks finds itself; one of details finds nothing.

    Args:
        feature: Map of one level, (N, C, H, W).
        scales: How often sizes are halved.

    Returns:
        (N, C, C), rows sum to 1, computed in float32.

    Example:
        >>> flat, fine = torch.ones(2, 2), torch.tensor([[1.0, -1], [-1, 1]])
        >>> logits = coarse_attention(torch.stack([flat, fine])[None], 1).log()
        >>> (logits - logits[..., 1:]).round(decimals=4).tolist()
        [[[1.0, 0.0], [0.0, 0.0]]]
    """
    feature = as_float(feature)
    # Bands are an orthogonal basis: products of blocks are those of means.
    coarse = haar(feature, scales)[0].flatten(2)
    with full_precision(coarse):
        product = coarse @ coarse.transpose(1, 2)
    lengths = (
        coarse.norm(dim=2)[:, :, None]
        * feature.flatten(2).norm(dim=2)[:, None]
    )
    return (product / lengths.clamp(min=1e-6)).softmax(2)


@MODELS.register_module()
class FreeKDLoss(nn.Module):
    r"""Absolute difference of the wavelet bands under masks of prompts.

    .. math:: w \sum_j \frac{1}{P} \sum_p
        mean(\omega M_{jp} \, |B_j(S) - B_j(T)|)

    :math:`B_j` are the three bands of columns, rows and diagonals of scale j
    of Haar's transform. A prompt p is a direction in the space of channels; it
    has a mask for each scale, :math:`\sigma(p^\top \sum B_j(T))`, of the sum
    of the three. The coarse band is left to a distance of the maps themselves:
    add :class:`mmkd.losses.mimic.MimicLoss` as a term of its own.

    With ``position`` each channel has a weight :math:`\omega_c`, by where its
    objects are:

    .. math:: \omega = C \, softmax(G(A)), \qquad
        A = softmax(\psi(F) F^\top)

    A is :func:`coarse_attention`; a gate G of two layers, the same for each
    channel, makes a number of its row. The mean of :math:`\omega` is 1, and at
    first all are. Without ``position`` all stay 1.

    Prompts and gate are not trained by this distance, which would shut the
    gate where the student is far. They learn by :meth:`reveal`: the teacher's
    map is put together again from bands times the sum of their masks and
    :math:`\omega`, and the teacher's own loss on it must be low, while masks
    overlap little. :class:`mmkd.terms.learned_mask.LearnedMaskTerm` sees to
    that; without it the masks stay at one half.

    Cells of the padded border do not count.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        prompts: Number of prompts of each band. In the authors' code: 6.
        scales: How often the coarse band is split again. Published: 3.
        loss_weight: Outer factor w. Published: 1, beside a mean squared error
            of weight 5.
        position: Whose map F the channels' weights are read from,
            ``'teacher'`` or ``'student'``; no weights if None.

    Not kept:
        batch: The sum is divided by what counts in the whole batch.
        border: Wavelets at the border reach over it.

    Reference:
        Zhang et al., "FreeKD: Knowledge Distillation via Semantic Frequency
        Prompt", CVPR 2024, arXiv:2311.12079. The abstract and the authors'
        code (https://github.com/Gumpest/FreeKD) were read for facts, and a
        reader's notes on the paper. The paper weighs channels by a gate over
        the relation of layers of different receptive fields; the code does
        not, and its numbers are without. What that relation and the gate are,
        that the coarser layer is the same map in blocks, and that the gate
        learns with the prompts, is ours. The code knows no border.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        prompts: int = 6,
        scales: int = 3,
        loss_weight: float = 1.0,
        position: str | None = None,
    ) -> None:
        super().__init__()
        check_positive('FreeKDLoss', prompts=prompts, scales=scales)
        if position is not None:
            check_name('FreeKDLoss', 'position', position, POSITIONS)
        self.channels = channels
        self.position = position
        self.loss_weight = loss_weight
        self.low = nn.Parameter(0.01 * torch.randn(prompts, channels))
        self.high = nn.Parameter(0.01 * torch.randn(scales, prompts, channels))
        if position is not None:
            hidden = max(HIDDEN, channels // REDUCTION)
            self.gate = nn.Sequential(
                nn.Linear(channels, hidden),
                nn.ReLU(),
                nn.Linear(hidden, 1),
            )
            nn.init.zeros_(self.gate[-1].weight)

    def masks(self, highs: Sequence[Tensor]) -> list[Tensor]:
        """Masks of each scale, (N, P, h, w)."""
        return [
            token_masks(bands.sum(2), prompts)
            for bands, prompts in zip(highs, self.high)
        ]

    def weights(self, feature: Tensor) -> Tensor:
        """How much each channel counts, (N, C); 1 in the mean."""
        if self.position is None:
            return as_float(feature).new_ones(feature.shape[:2])
        attention = coarse_attention(feature, len(self.high))
        with full_precision(attention):
            # Entries are about 1 however many channels there are.
            scores = self.gate(self.channels * attention).squeeze(2)
        return self.channels * scores.softmax(1)

    def reveal(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What the masks leave of the teacher's map, and their overlap.

        Args:
            teacher: Map of one level, (N, C, H, W).

        Returns:
            Map of the same shape and a scalar, summed over the coarse band
            and the scales, both with a gradient to the prompts, the map with
            one to the gate.
        """
        check_channels('FreeKDLoss', teacher, self.channels)
        low, highs = haar(teacher, len(self.high))
        coarse, masks = token_masks(low, self.low), self.masks(highs)
        overlap = sum(mask_overlap(one) for one in (coarse, *masks))
        weights = self.weights(teacher)[:, :, None, None, None]
        left = [
            weights * bands * one.sum(1)[:, None, None]
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
            seen = student if self.position == 'student' else teacher
            weights = self.weights(seen * equal_weight(gt, seen))
            weights = weights[:, :, None, None, None]
        # The transform is linear.
        _, gaps = haar(as_float(student) - as_float(teacher), len(self.high))
        loss = 0.0
        for mask, gap in zip(masks, gaps):
            error = (weights * gap.abs()).mean((1, 2))[:, None]  # N, 1, h, w
            weight = equal_weight(gt, mask)
            total = (weight * mask * error).sum()
            loss = loss + total / weight.sum().clamp(min=1)
        # DDP waits for a gradient of every weight.
        idle = sum(zero_of(one) for one in self.parameters())
        return self.loss_weight * loss + idle
