"""DLKD: objects point where the teacher's do, and lie as near each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.checks import check_channels, check_fraction, check_positive
from mmkd.ops.contrast import supervised_contrast
from mmkd.ops.gather import gather_rows
from mmkd.ops.numeric import full_precision, unit, zero_of
from mmkd.ops.regions import jittered_boxes, pyramid_vectors
from mmkd.ops.relations import row_divergence
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


def align_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How far vectors point away from the teacher's.

    .. math:: 2 - \frac{2}{R} \sum_r \cos(s_r, t_r)

    Args:
        student: Vectors of R regions, (R, C).
        teacher: Vectors of the same regions, without gradient, (R, C).

    Returns:
        Scalar in [0, 4] that ignores all lengths: 0 for one direction, 2 for
        a right angle, 4 for opposite ones.

    Reference:
        As :class:`DLKDLoss`.

    Example:
        >>> x = torch.randn(4, 8)
        >>> abs(align_loss(3 * x, x).item()) < 1e-6
        True
    """
    cosine = (unit(student, dim=1) * unit(teacher, dim=1)).sum(1)
    return 2 - 2 * cosine.mean()


def correlate_loss(
    student: Tensor, teacher: Tensor, temperature: float = 0.5
) -> Tensor:
    r"""Divergence of what each view resembles, from what it does by the
    teacher.

    With the cosine :math:`c_{mj}` of a view m and the object j, of all M
    objects:

    .. math:: \frac{1}{MV} \sum_m KL(softmax_j(c^T_{mj} / \tau) \|
        softmax_j(c^S_{mj} / \tau))

    Args:
        student: Vectors of M objects, each followed by V views of it,
            (M, 1 + V, C).
        teacher: The same, without gradient, (M, 1 + V, C').
        temperature: The formula's tau.

    Returns:
        Scalar >= 0 that ignores lengths and a rotation of either space; 0 for
        one object.

    Reference:
        As :class:`DLKDLoss`.

    Example:
        >>> x = torch.randn(4, 3, 8)
        >>> correlate_loss(3 * x, x).item() < 1e-6
        True
    """
    own, other = (
        _similarities(one) / temperature for one in (student, teacher)
    )
    return row_divergence(own, other).mean()


def _similarities(vectors: Tensor) -> Tensor:
    """Cosines of every view to every object, (M, 1 + V, C) → (M, V, M)."""
    directions = unit(vectors, dim=2)
    with full_precision(directions):
        return directions[:, 1:] @ directions[:, 0].T


@MODELS.register_module()
class DLKDLoss(nn.Module):
    r"""Alignment, correlation and contrast of the batch's objects.

    The paper compares vectors of whole images and of their rotations. Here
    the samples are the ground-truth boxes of all images, of all processes
    where there are several; a box is its upright image, and ``num_views``
    boxes jittered around it are its rotations. Each is the mean of the map
    over the box, read from the level of its object's size.

    - ``align``: :func:`align_loss` of g of the student's regions to the
      teacher's; g is linear, BatchNorm, ReLU, linear.
    - ``correlate``: :func:`correlate_loss` of q of the student's regions; q
      is built alike and keeps the channels.
    - ``contrast``: :func:`supervised_contrast
      <mmkd.ops.contrast.supervised_contrast>` over the regions of both
      networks together, each side through a linear layer of its own that
      learns along; regions of one class belong together.

    Of detectors of queries
    :class:`~mmkd.terms.query_feature.QueryFeatureTerm`
    gives what the decoders make of the queries that answer for a box and its
    views, in place of means over maps.

    The layers stay behind when the student is deployed. Fewer than two
    regions, that is no box at all, cost nothing.

    Args:
        student_channels, teacher_channels: Of the maps of either side.
        loss_weight: Factor of all parts.
        align_weight, correlate_weight, contrast_weight: Of each. Published
            for CIFAR-100: the defaults; for ImageNet 10, 20 and 0.5.
        num_views: Jittered boxes of an object.
        jitter: How far they are moved and stretched, as a share of the side.
        temperature: Of ``correlate``.
        contrast_temperature: Of ``contrast``.
        hidden_ratio: Hidden units of g, in ``teacher_channels``.
        embedding_channels: Of what is contrasted.
        canonical_size: Root of the area, in pixels, of a box that is read at
            stride 16, one of twice the side at stride 32.
        output_size: Bins of RoIAlign in each direction.

    Returns:
        ``align``, ``correlate`` and ``contrast``, computed in float32.

    Raises:
        ValueError: If channels or the number of levels do not fit, or a
            setting is out of range.

    Not kept:
        equality: What is aligned is g of the student, and contrast is never
            0.
        batch: Objects of all images are related to each other.

    Reference:
        Ding et al., "Multi-level Knowledge Distillation via Knowledge
        Alignment and Correlation", arXiv:2012.00573, later Dual-Level
        Knowledge Distillation (IEEE TNNLS 2024). Facts from a summary of the
        authors' code (https://github.com/ifding/DLKD). Theirs are the three
        parts, the layers, temperatures and weights. Ours: regions as samples,
        boxes jittered in place of rotations, the level of a box, and that
        views are contrasted as well.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(
        student_channels=8,
        teacher_channels=8,
        hidden_ratio=2,
        canonical_size=20,
    )

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        loss_weight: float = 1.0,
        align_weight: float = 20.0,
        correlate_weight: float = 50.0,
        contrast_weight: float = 1.0,
        num_views: int = 3,
        jitter: float = 0.15,
        temperature: float = 0.5,
        contrast_temperature: float = 0.07,
        hidden_ratio: int = 16,
        embedding_channels: int = 128,
        canonical_size: float = 224.0,
        output_size: int = 7,
    ) -> None:
        super().__init__()
        check_positive(
            'DLKDLoss',
            num_views=num_views,
            temperature=temperature,
            contrast_temperature=contrast_temperature,
            hidden_ratio=hidden_ratio,
            canonical_size=canonical_size,
            output_size=output_size,
        )
        check_fraction('DLKDLoss', jitter=jitter)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.loss_weight = loss_weight
        self.align_weight = align_weight
        self.correlate_weight = correlate_weight
        self.contrast_weight = contrast_weight
        self.num_views, self.jitter = num_views, jitter
        self.temperature = temperature
        self.contrast_temperature = contrast_temperature
        self.canonical_size = canonical_size
        self.output_size = output_size
        self.aligner = _layers(
            student_channels, hidden_ratio * teacher_channels, teacher_channels
        )
        self.correlator = _layers(
            student_channels, student_channels, student_channels
        )
        self.student_embedding = nn.Linear(
            student_channels, embedding_channels
        )
        self.teacher_embedding = nn.Linear(
            teacher_channels, embedding_channels
        )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> dict[str, Tensor]:
        own, other, labels = self._regions(student, teacher, gt)
        return self._related(own, other, labels, student)

    def compare_objects(
        self, student: Tensor, teacher: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The same of objects whose vectors are there already.

        Args:
            student: Of M objects, the object's own vector first and its views
                behind it, (M, 1 + V, C).
            teacher: The same, without gradient, (M, 1 + V, C').
            labels: Classes of the objects, (M,).
        """
        self._check_channels((student.mT,), (teacher.mT,))
        rows = (gather_rows(one) for one in (student, teacher, labels))
        return self._related(*rows, (student,))

    def _related(
        self,
        own: Tensor,
        other: Tensor,
        labels: Tensor,
        touched: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """The three parts, of objects of all processes."""
        if not len(own):
            touched = *touched, *self.parameters()
            nothing = sum(zero_of(one) for one in touched)
            return dict.fromkeys(('align', 'correlate', 'contrast'), nothing)
        rows, like = own.flatten(0, 1), other.flatten(0, 1)
        with full_precision(rows):
            aligned = self.aligner(rows)
            correlated = self.correlator(rows).view_as(own)
            embedded = torch.cat(
                [self.student_embedding(rows), self.teacher_embedding(like)]
            )
        labels = labels.repeat_interleave(own.shape[1]).repeat(2)
        parts = dict(
            align=self.align_weight * align_loss(aligned, like),
            correlate=self.correlate_weight
            * correlate_loss(correlated, other, self.temperature),
            contrast=self.contrast_weight
            * supervised_contrast(embedded, labels, self.contrast_temperature),
        )
        return {
            name: self.loss_weight * value for name, value in parts.items()
        }

    def _regions(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of boxes and their views, (M, 1 + V, C) of either side, and
        the classes of the boxes, (M,)."""
        self._check_channels(student, teacher)
        boxes = None
        if gt is not None:
            sizes = gt.image_sizes[gt.image]
            boxes = jittered_boxes(
                gt.boxes, sizes, self.num_views, self.jitter
            )
        own, other = pyramid_vectors(
            'DLKDLoss',
            student,
            teacher,
            gt,
            boxes,
            self.canonical_size,
            self.output_size,
        )
        return gather_rows(own), gather_rows(other), gather_rows(gt.labels)

    def _check_channels(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        for one, channels, side in (
            (student, self.student_channels, 'student'),
            (teacher, self.teacher_channels, 'teacher'),
        ):
            for level in one:
                check_channels(f'DLKDLoss, {side}_channels,', level, channels)


def _layers(in_channels: int, hidden: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(in_channels, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out_channels),
    )
