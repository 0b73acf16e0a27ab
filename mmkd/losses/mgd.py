"""MGD: generate the teacher's map from the part of the student's left over."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_channels, check_fraction, check_same_shape
from mmkd.ops.generation import generation_block
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def random_mask(feature: Tensor, mask_ratio: float) -> Tensor:
    """Zero at a random share of locations and one elsewhere, (N, 1, H, W).

    Args:
        feature: Map whose size and device count, (N, C, H, W).
        mask_ratio: Probability that a location is masked out.
    """
    images, _, height, width = feature.shape
    draw = torch.rand(images, 1, height, width, device=feature.device)
    return (draw >= mask_ratio).to(draw)


@MODELS.register_module()
class MGDLoss(nn.Module):
    r"""Squared error of the teacher's map generated from a masked one.

    .. math:: \frac{w}{N} \| G(M \odot S) - T \|^2

    The mask M hides random locations in all channels at once, G is a 3x3
    convolution, ReLU, and a 3x3 convolution that learn along. The mask is
    drawn from torch's global random state, in training and evaluation alike.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        loss_weight: The paper's alpha. Published: 2e-5 for one-stage
            detectors, 5e-7 for two-stage ones.
        mask_ratio: The paper's lambda, the share of locations masked *out*.
            Published: 0.65 for one-stage detectors, 0.45 for two-stage ones.

    Not kept:
        equality: What is generated from a part of the map is compared.
        batch: What is hidden is drawn for the batch as one.
        border: Generation and error see the whole map, as published.

    Reference:
        Yang et al., "Masked Generative Distillation", ECCV 2022,
        arXiv:2205.01529. Settings from the authors' configs, which clip
        gradients at 35.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        loss_weight: float = 2e-5,
        mask_ratio: float = 0.65,
    ) -> None:
        super().__init__()
        check_fraction('MGDLoss', mask_ratio=mask_ratio)
        self.channels = channels
        self.loss_weight = loss_weight
        self.mask_ratio = mask_ratio
        self.generation = generation_block(channels)

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        check_same_shape('MGDLoss', student, teacher)
        check_channels('MGDLoss', teacher, self.channels)
        student = as_float(student)
        left_over = student * random_mask(student, self.mask_ratio)
        generated = as_float(self.generation(left_over))
        error = F.mse_loss(generated, as_float(teacher), reduction='sum')
        return self.loss_weight * error / len(student)
