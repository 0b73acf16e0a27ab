"""Proposal features: what both second stages classify proposals by."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmkd.build import build
from mmkd.ops.numeric import zero_of
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import recording
from mmkd.terms.classifier import classifier_weight, readers
from mmkd.terms.proposal import SecondStageTerm, row_labels, row_of

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class ProposalFeatureTerm(SecondStageTerm):
    r"""The vector of each proposal that classes are told by, on both sides.

    .. math:: L = loss(align(f^S), f^T)

    f is the input of ``fc_cls``, after the layers that a head shares between
    classes and boxes. The student's proposals, those that its own loss
    sampled, are judged by both sides; the teacher runs its second stage on
    its own maps, and never proposes.

    A loss sees the proposals of a batch as the cells of one row,
    (1, D, 1, M), and the label of each as a box over its cell, so that losses
    of maps serve here. ``LSHLoss`` with ``unfold=1`` is the published one.

    Args:
        teacher: Name of the teacher.
        loss: Config of the loss.
        align: Config of the neck that brings the student's vectors to the
            teacher's width: ``ConvAdapt`` is a linear layer of a row. None if
            they are as wide.
        correct_only: Let a proposal count only if the teacher's best class is
            the label that the student gave it, background included. Needs a
            loss that takes a weight.
        stage: Which of the student's stages, if it is a cascade; -1 is the
            last.
        teacher_stage: The same for the teacher.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a detector has no second stage with an ``fc_cls``, the
            vectors differ in width, or the teacher's maps are not of the
            strides that its head expects, while the model is built.

    Reference:
        Wang et al., "Distilling Knowledge by Mimicking Features", IEEE TPAMI
        2022, arXiv:2011.01424. Read: what the authors' code does
        (https://github.com/DoctorKey/LSHFM.detection) in a summary of it. To
        count only what the teacher gets right is their way to classify
        images; for proposals it is ours.
    """

    part = 'bbox_head'
    runs = '_bbox_forward'

    def __init__(
        self,
        teacher: str,
        loss: Mapping,
        align: Mapping | None = None,
        correct_only: bool = False,
        stage: int = 0,
        teacher_stage: int = -1,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(teacher, stage, teacher_stage, schedule)
        self.loss = build(loss, 'loss')
        self.align = (
            None if align is None else build(align, 'align', num_levels=1)
        )
        self.correct_only = correct_only
        takes = inspect.signature(self.loss.forward).parameters
        if correct_only and 'weight' not in takes:
            raise ValueError(
                f'ProposalFeatureTerm with correct_only=True weighs '
                f'proposals, but {type(self.loss).__name__} takes no weight. '
                f'Leave it out, or use a loss that does, for instance '
                f'mmkd.LSHLoss.'
            )
        self._introduced = False

    def silent(self) -> bool:
        return getattr(self.loss, 'loss_weight', None) == 0

    def compares_classes(self) -> bool:
        return self.correct_only

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        super().bind(student, teachers)
        self.vectors = f'{self.path.removesuffix(".loss_and_target")}.fc_cls'
        self.tap(student, self.vectors)

    def check_heads(self, own: nn.Module, other: nn.Module) -> None:
        if self.correct_only:
            super().check_heads(own, other)
        for head, side in ((own, 'student'), (other, 'teacher')):
            if getattr(head, 'fc_cls', None) is None:
                raise ValueError(
                    f'ProposalFeatureTerm compares the input of fc_cls, but '
                    f'the {side} has a {type(head).__name__} without one. '
                    f"Use a feature term (tap='neck')."
                )
        widths = own.fc_cls.in_features, other.fc_cls.in_features
        if self.align is None and widths[0] != widths[1]:
            raise ValueError(
                f'ProposalFeatureTerm compares vectors of one width, but the '
                f"student's have {widths[0]} numbers and the teacher's "
                f"{widths[1]}. Add align=dict(type='mmkd.ConvAdapt', "
                f'in_channels={widths[0]}, out_channels={widths[1]}) to this '
                f'term.'
            )
        for loss in readers([self.loss]):
            loss.read_classifier(classifier_weight(type(loss).__name__, other))

    def forward(self, step: Step) -> Tensor | dict[str, Tensor]:
        seen = self.seen(step)
        if seen is None:
            return step.images.new_zeros(()) + self.touch()
        (own, *_), _ = step.student.inputs(self.vectors)
        other, scores = self._judged(step, seen['rois'])
        self._introduce(step)
        labels = seen['bbox_targets'][0]
        return self._compare(own, other, scores, labels)

    def _judged(self, step: Step, rois: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's vectors of RoIs, (M, D), and its scores of them."""
        _, head = self.pair(step)
        with recording(head, ['fc_cls']) as record:
            scores = self.judge(step, rois)['cls_score']
        (vectors, *_), _ = record.inputs('fc_cls')
        return vectors.detach(), scores

    def _introduce(self, step: Step) -> None:
        """Show the teacher's classifier to a loss that asks for it, once."""
        if self._introduced:
            return
        self._introduced = True
        for loss in readers([self.loss]):
            _, head = self.pair(step)
            loss.read_classifier(classifier_weight(type(loss).__name__, head))

    def _compare(
        self, own: Tensor, other: Tensor, scores: Tensor, labels: Tensor
    ) -> Tensor | dict[str, Tensor]:
        given = len(own)
        if not given:  # one that does not count, so that parts are named
            own = own.new_zeros(1, own.shape[1]) + zero_of(own).to(own)
            other, scores, labels = (
                one.new_zeros(1, *one.shape[1:])
                for one in (other, scores, labels)
            )
        rows = [(row_of(own),), (row_of(other),)]
        if self.align is not None:
            rows[0] = self.align(*rows)
        more: list[Any] = []
        if self.correct_only:
            right = (scores.argmax(1) == labels).to(own)
            more.append((right.view(1, 1, 1, -1),))
        if getattr(self.loss, 'scope', 'level') != 'levels':
            rows, more = ([one for (one,) in group] for group in (rows, more))
        loss = self.loss(*rows, row_labels(labels), *more)
        if given:
            return loss
        if not isinstance(loss, Mapping):
            return 0 * loss
        return {name: 0 * value for name, value in loss.items()}
