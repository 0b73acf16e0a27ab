"""AMD: generate the teacher's map where the teacher's attention is hidden."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import (
    check_channels,
    check_fraction,
    check_positive,
    check_same_shape,
)
from mmkd.ops.generation import generation_block, hide_strongest
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


class SqueezeExcitation(nn.Module):
    r"""Each channel times a factor in (0, 1) that all channels decide on.

    .. math:: x \cdot \sigma(W_2 \, relu(W_1 \, mean_{hw} \, x))

    Args:
        channels: Channels of the map, (N, C, H, W) → same.
        reduction: Divides the channels in between; at least one is left.

    Reference:
        Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018,
        arXiv:1709.01507.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.squeeze = nn.Linear(channels, inner)
        self.excite = nn.Linear(inner, channels)

    def forward(self, feature: Tensor) -> Tensor:
        inner = self.squeeze(feature.mean((2, 3))).relu()
        return feature * self.excite(inner).sigmoid()[:, :, None, None]


@MODELS.register_module()
class AMDLoss(nn.Module):
    r"""Squared error of the teacher's map generated from what is left.

    .. math:: \frac{w}{N} \| G(M \odot E(S)) - T \|^2

    E is a :class:`SqueezeExcitation` of the student's channels, M hides the
    locations where the teacher's spatial attention is strongest, in all
    channels at once (where the mean of its absolute values over the channels
    is largest), and G is a 3x3 convolution, ReLU, and a 3x3 convolution.
    E and G learn along. Nothing is drawn at random.

    It is a sum over cells as in MGD, and like there the padded border counts
    too.

    Args:
        channels: Channels of both maps; align the student's first if they
            differ.
        loss_weight: Factor w. The default is MGD's for one-stage detectors.
        mask_ratio: Share of the locations that are hidden. The default is
            MGD's for one-stage detectors.
        reduction: Divides the channels inside E.

    Not kept:
        equality: What is generated from a part of the map is compared.
        border: Generation and error see the whole map, as published.

    Reference:
        Yang et al., "AMD: Adaptive Masked Distillation for Object Detection",
        arXiv:2301.13538. Its abstract and second-hand descriptions were read,
        not the paper: that the mask hides what is salient, and that a simple
        module adapts the student's channels. That a fixed share is hidden by
        rank (so that the attention's temperature does not matter), that E
        comes before the mask, its reduction of 16, and to take share and
        weight from MGD, are ours.
    """

    example: ClassVar[dict] = dict(channels=8)

    def __init__(
        self,
        channels: int,
        loss_weight: float = 2e-5,
        mask_ratio: float = 0.65,
        reduction: int = 16,
    ) -> None:
        super().__init__()
        check_fraction('AMDLoss', mask_ratio=mask_ratio)
        check_positive('AMDLoss', reduction=reduction)
        self.channels = channels
        self.loss_weight = loss_weight
        self.mask_ratio = mask_ratio
        self.excitation = SqueezeExcitation(channels, reduction)
        self.generation = generation_block(channels)

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> Tensor:
        check_same_shape('AMDLoss', student, teacher)
        check_channels('AMDLoss', teacher, self.channels)
        student, teacher = as_float(student), as_float(teacher)
        strength = teacher.abs().mean(1, keepdim=True)
        mask = hide_strongest(strength, self.mask_ratio)
        with full_precision(student):
            generated = self.generation(mask * self.excitation(student))
        error = F.mse_loss(generated, teacher, reduction='sum')
        return self.loss_weight * error / len(student)
