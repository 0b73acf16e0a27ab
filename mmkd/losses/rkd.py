"""RKD: objects lie to each other as they do for the teacher."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.ops.numeric import full_precision, unit, zero_of
from mmkd.ops.regions import region_vectors
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Smooth L1 between pairwise distances, each divided by their mean.

    The mean runs over the pairs that differ; the loss averages over all
    :math:`M^2` pairs.

    Args:
        student: Vectors of M samples, (M, C).
        teacher: Vectors of the same samples, without gradient, (M, C').

    Returns:
        Scalar that ignores scale, shift and rotation of either side; zero
        for fewer than two samples.

    Reference:
        Park et al., "Relational Knowledge Distillation", CVPR 2019,
        arXiv:1904.05068.

    Example:
        >>> x = torch.randn(4, 8)
        >>> rkd_distance(5 * x + 1, x).item() < 1e-6
        True
    """
    if len(student) < 2:
        return zero_of(student)
    return F.smooth_l1_loss(
        _distances(_offsets(student)), _distances(_offsets(teacher))
    )


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Smooth L1 between the cosines of all triplets.

    The cosine at sample i between j and k is that of :math:`x_j - x_i` and
    :math:`x_k - x_i`, 0 where two of them coincide; the loss averages over
    all :math:`M^3`.

    Args:
        student: Vectors of M samples, (M, C).
        teacher: Vectors of the same samples, without gradient, (M, C').

    Returns:
        Scalar that ignores scale, shift and rotation of either side; zero
        for fewer than three samples.

    Reference:
        As :func:`rkd_distance`.
    """
    if len(student) < 3:
        return zero_of(student)
    return F.smooth_l1_loss(
        _cosines(_offsets(student)), _cosines(_offsets(teacher))
    )


def _offsets(vectors: Tensor) -> Tensor:
    """From sample i to sample j, (M, M, C)."""
    return vectors[None] - vectors[:, None]


def _distances(offsets: Tensor) -> Tensor:
    """Lengths divided by the mean of those that are not zero, (M, M)."""
    length = torch.linalg.vector_norm(offsets, dim=2)
    mean = length.sum() / (length > 0).sum().clamp(min=1)
    return length / mean.clamp(min=1e-6)


def _cosines(offsets: Tensor) -> Tensor:
    """Cosine at i between j and k, (M, M, M)."""
    directions = unit(offsets, dim=2)
    with full_precision(directions):
        return directions @ directions.transpose(1, 2)


@MODELS.register_module()
class RKDLoss(nn.Module):
    """Relational distillation of the batch's objects.

    The samples are the ground-truth boxes of all images together, each the
    mean of the map over its box: two images give tens of samples, where whole
    images would give two. Relations need no adapter, so student and teacher
    may differ in channels and size. Fewer than two boxes have no distance,
    fewer than three no angle: the part is zero.

    Args:
        loss_weight: Factor of both parts.
        distance_weight: Factor of :func:`rkd_distance`.
        angle_weight: Factor of :func:`rkd_angle`.
        output_size: Bins of RoIAlign in each direction.
        max_regions: At most so many boxes take part, evenly spread over the
            batch: the angles need memory in the cube of their number.

    Returns:
        ``distance`` and ``angle``, computed in float32.

    Not kept:
        batch: Objects of all images are related to each other.

    Reference:
        Park et al., arXiv:1904.05068. Weights 25 and 50 as in MMRazor; the
        regions are ours, following instance-wise relations as in Dai et al.,
        "General Instance Distillation", CVPR 2021, arXiv:2103.02340.
    """

    example: ClassVar[dict] = dict()

    def __init__(
        self,
        loss_weight: float = 1.0,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        output_size: int = 7,
        max_regions: int = 64,
    ) -> None:
        super().__init__()
        check_positive(
            'RKDLoss', output_size=output_size, max_regions=max_regions
        )
        self.loss_weight = loss_weight
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.output_size = output_size
        self.max_regions = max_regions

    def forward(
        self, student: Tensor, teacher: Tensor, gt: GroundTruth | None = None
    ) -> dict[str, Tensor]:
        student, teacher = (
            region_vectors(one, gt, self.output_size, self.max_regions)
            for one in (student, teacher)
        )
        distance = self.distance_weight * rkd_distance(student, teacher)
        angle = self.angle_weight * rkd_angle(student, teacher)
        return dict(
            distance=self.loss_weight * distance,
            angle=self.loss_weight * angle,
        )
