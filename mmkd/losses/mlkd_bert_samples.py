"""MLKD-BERT, samples: objects resemble each other as the teacher has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmkd.checks import check_channels, check_positive
from mmkd.ops.contrast import supervised_contrast
from mmkd.ops.gather import gather_rows
from mmkd.ops.numeric import full_precision, zero_of
from mmkd.ops.regions import pyramid_vectors
from mmkd.ops.relations import relation_divergence
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth


@MODELS.register_module()
class MLKDBertSampleLoss(nn.Module):
    r"""Relations and classes of the batch's objects, the second stage.

    The paper compares the summary tokens of sentences. Here the samples are
    the ground-truth boxes of all images, of all processes where there are
    several, each the mean of the map over its box, read from the level of its
    size. With M of them as rows of X:

    - ``ss``: the mean divergence of the rows of
      :math:`softmax(X X^\top / \sqrt{C})` from the teacher's, see
      :func:`relation_divergence <mmkd.ops.relations.relation_divergence>`;
      widths may differ.
    - ``sc``: :func:`supervised_contrast
      <mmkd.ops.contrast.supervised_contrast>` over the 2 M vectors of both
      networks, the student's through a matrix that learns along; objects of
      one class belong together.

    The paper's third part, soft targets, is a term of its own. No box costs
    nothing.

    Args:
        student_channels, teacher_channels: Of the maps of either side.
        loss_weight: Factor of both parts.
        ss_weight, sc_weight: Of each. The paper adds them as they are.
        temperature: Of ``sc``; ours.
        canonical_size: Root of the area, in pixels, of a box that is read at
            stride 16, one of twice the side at stride 32.
        output_size: Bins of RoIAlign in each direction.

    Returns:
        ``ss`` and ``sc``, computed in float32.

    Raises:
        ValueError: If channels or the number of levels do not fit, or a
            setting is not positive.

    Not kept:
        equality: A contrast is never 0.
        batch: Objects of all images are related to each other.

    Reference:
        Zhang et al., "MLKD-BERT: Multi-level Knowledge Distillation for
        Pre-trained Language Models", arXiv:2407.02775. Read: a summary; no
        code is known. Ours: objects as samples, and the matrix.
    """

    scope = 'levels'
    example: ClassVar[dict] = dict(
        student_channels=8, teacher_channels=8, canonical_size=20
    )

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        loss_weight: float = 1.0,
        ss_weight: float = 1.0,
        sc_weight: float = 1.0,
        temperature: float = 0.1,
        canonical_size: float = 224.0,
        output_size: int = 7,
    ) -> None:
        super().__init__()
        check_positive(
            'MLKDBertSampleLoss',
            temperature=temperature,
            canonical_size=canonical_size,
            output_size=output_size,
        )
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.loss_weight = loss_weight
        self.ss_weight, self.sc_weight = ss_weight, sc_weight
        self.temperature = temperature
        self.canonical_size = canonical_size
        self.output_size = output_size
        self.projection = nn.Linear(
            student_channels, teacher_channels, bias=False
        )

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None = None,
    ) -> dict[str, Tensor]:
        own, other, labels = self._samples(student, teacher, gt)
        if not len(own):
            touched = *student, self.projection.weight
            nothing = sum(zero_of(one) for one in touched)
            return dict(ss=nothing, sc=nothing)
        with full_precision(own):
            both = torch.cat([self.projection(own), other])
        ss = relation_divergence(own, other)
        sc = supervised_contrast(both, labels.repeat(2), self.temperature)
        return dict(
            ss=self.loss_weight * self.ss_weight * ss,
            sc=self.loss_weight * self.sc_weight * sc,
        )

    def _samples(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        gt: GroundTruth | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of either side, (M, C), and classes, (M,)."""
        for maps, channels, side in (
            (student, self.student_channels, 'student'),
            (teacher, self.teacher_channels, 'teacher'),
        ):
            for one in maps:
                check_channels(
                    f'MLKDBertSampleLoss, {side}_channels,', one, channels
                )
        own, other = pyramid_vectors(
            'MLKDBertSampleLoss',
            student,
            teacher,
            gt,
            side=self.canonical_size,
            output_size=self.output_size,
        )
        return (
            gather_rows(own[:, 0]),
            gather_rows(other[:, 0]),
            gather_rows(gt.labels),
        )
