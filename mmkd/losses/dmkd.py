"""DMKD: generate the teacher's map twice, without cells, without channels."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_channels, check_fraction, check_same_shape
from mmkd.ops.generation import generation_block, hide_strongest
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


@MODELS.register_module()
class DMKDLoss(nn.Module):
    r"""Squared error of the teacher's map generated in two ways and fused.

    .. math:: \frac{w}{N} \| a \, G_s(M_s \odot S)
        + (1 - a) \, G_c(M_c \odot S) - T \|^2

    :math:`M_s` hides the locations, :math:`M_c` the channels where the
    teacher's attention is strongest: the mean of its absolute values over the
    channels, or over space. :math:`G_s` and :math:`G_c` are
    each a 3x3 convolution, ReLU, and a 3x3 convolution. They learn along, and
    so does a, the first of two weights that a softmax makes of two numbers;
    it starts at a half.

    It is a sum over cells as in MGD, and like there the padded border counts
    too.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        loss_weight: Factor w. The default is MGD's for one-stage detectors.
        spatial_ratio: Share of the locations that are hidden from
            :math:`G_s`. The default is MGD's for one-stage detectors.
        channel_ratio: Share of the channels that are hidden from
            :math:`G_c`.

    Not kept:
        equality: What is generated from a part of the map is compared.
        border: Generation and error see the whole map, as published.

    Reference:
        Yang et al., "DMKD: Improving Feature-based Knowledge Distillation for
        Object Detection Via Dual Masking Augmentation", ICASSP 2024,
        arXiv:2309.02719. Its abstract and second-hand descriptions were read,
        not the paper: two attentions guide two masking branches that hide
        salient cells and chosen channels, and weights that adjust themselves
        fuse what is generated. That a fixed share is hidden by rank (so that
        the attentions' temperature does not matter), the softmax, both shares
        and the weight are ours.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        loss_weight: float = 2e-5,
        spatial_ratio: float = 0.65,
        channel_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        check_fraction(
            'DMKDLoss',
            spatial_ratio=spatial_ratio,
            channel_ratio=channel_ratio,
        )
        self.channels = channels
        self.loss_weight = loss_weight
        self.spatial_ratio = spatial_ratio
        self.channel_ratio = channel_ratio
        self.spatial_generation = generation_block(channels)
        self.channel_generation = generation_block(channels)
        self.fusion = nn.Parameter(torch.zeros(2))

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        check_same_shape('DMKDLoss', student, teacher)
        check_channels('DMKDLoss', teacher, self.channels)
        student, teacher = as_float(student), as_float(teacher)
        strength = teacher.abs()
        cells = hide_strongest(
            strength.mean(1, keepdim=True), self.spatial_ratio
        )
        channels = hide_strongest(
            strength.mean((2, 3), keepdim=True), self.channel_ratio
        )
        spatial, channel = self.fusion.softmax(0)
        with full_precision(student):
            generated = spatial * self.spatial_generation(cells * student)
            generated = generated + channel * self.channel_generation(
                channels * student
            )
        error = F.mse_loss(generated, teacher, reduction='sum')
        return self.loss_weight * error / len(student)
