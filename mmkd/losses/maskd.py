"""MasKD: imitate where tokens, learned on the teacher, say that it matters."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.checks import check_channels, check_positive, check_same_shape
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float, full_precision, zero_of
from mmkd.ops.tokens import mask_overlap, token_masks
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def maskd_loss(
    student: Tensor, teacher: Tensor, masks: Tensor, shares: Tensor
) -> Tensor:
    r"""Squared error under several masks, each of which has its share.

    .. math:: \frac{1}{N} \sum_{nt} p_{nt} \frac{\sum_{ij} M_{ntij}^2
        \sum_c (S - T)^2_{ncij}}{C \sum_{ij} M_{ntij}}

    Args:
        student: Map of one level, (N, C, H, W).
        teacher: Map of the same level and shape, without gradient.
        masks: At least 0, (N, T, H, W).
        shares: How much each mask counts in its image, (N, T).

    Returns:
        Scalar, 0 where the masks are, computed in float32.

    Example:
        >>> x, mask = torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), 0.5)
        >>> maskd_loss(x + 2, x, mask, torch.ones(1, 1)).item()
        2.0
    """
    check_same_shape('MasKDLoss', student, teacher)
    error = (as_float(student) - as_float(teacher)).square()
    error = error.mean(1, keepdim=True)
    # Where nothing counts, the sum above is zero as well.
    sizes = masks.sum((2, 3)).clamp(min=1e-6)
    means = (masks.square() * error).sum((2, 3)) / sizes  # N, T
    return (shares * means).sum() / len(student)


@MODELS.register_module()
class MasKDLoss(nn.Module):
    r"""Squared error under masks that receptive tokens draw.

    A token t is a direction in the space of channels; its mask is
    :math:`M_t = \sigma(t^\top T_{ij})`. How much a mask counts in an image is
    :math:`p = softmax(W_2 \, mean_{hw}(W_1 * T))`, of a 3x3 convolution and a
    linear layer.

    Tokens and shares are not trained by this distance. They learn by
    :meth:`reveal`: of the teacher's map only :math:`T \sum_t p_t M_t` is left,
    and the teacher's own loss on what is left must be low, while the masks of
    an image must overlap little (masks that let everything through would
    serve the teacher best, and are all the same).
    :class:`mmkd.terms.learned_mask.LearnedMaskTerm` sees to that; without it
    the masks stay at one half, and the distance is half the mean squared
    error.

    Cells of the padded border do not count.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        tokens: Number of tokens. Published: 6.
        customise: Multiply the masks by those that the tokens draw on the
            student's map.
        loss_weight: Outer factor. Published: 7 for RetinaNet R-101.

    Reference:
        Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023,
        arXiv:2205.14589. Its abstract and the authors' code
        (https://github.com/hunto/MasKD) were read for facts. They customise
        after 7000 steps, here from the first, and know no border.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        tokens: int = 6,
        customise: bool = True,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive('MasKDLoss', tokens=tokens)
        self.channels = channels
        self.customise = customise
        self.loss_weight = loss_weight
        self.tokens = nn.Parameter(0.01 * torch.randn(tokens, channels))
        self.weigher = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, tokens),
        )

    def masks(self, feature: Tensor) -> Tensor:
        """What the tokens draw on a map, (N, T, H, W)."""
        return token_masks(feature, self.tokens)

    def shares(self, teacher: Tensor) -> Tensor:
        """How much each mask counts in its image, (N, T); they sum to 1."""
        teacher = as_float(teacher)
        with full_precision(teacher):
            return self.weigher(teacher).softmax(1)

    def reveal(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What the masks leave of the teacher's map, and their overlap.

        Args:
            teacher: Map of one level, (N, C, H, W).

        Returns:
            Map of the same shape and a scalar, both with a gradient to tokens
            and shares.
        """
        check_channels('MasKDLoss', teacher, self.channels)
        masks = self.masks(teacher)
        passed = (self.shares(teacher)[:, :, None, None] * masks).sum(1, True)
        return as_float(teacher) * passed, mask_overlap(masks)

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        check_same_shape('MasKDLoss', student, teacher)
        check_channels('MasKDLoss', teacher, self.channels)
        with torch.no_grad():
            masks = self.masks(teacher) * equal_weight(gt, teacher)
            if self.customise:
                masks = masks * self.masks(student)
            shares = self.shares(teacher)
        loss = maskd_loss(student, teacher, masks, shares)
        # DDP waits for a gradient of every weight.
        idle = sum(zero_of(one) for one in self.parameters())
        return self.loss_weight * loss + idle
