"""Box: every cell's box becomes the teacher's, whatever its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_name
from mmkd.ops.boxes import giou_error
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.assignment import (
    assigned_labels,
    check_assigns,
    count_positives,
)
from mmkd.terms.decoding import (
    check_decodable,
    check_same_anchors,
    decode,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

NORMALISERS = ('positives', 'weight')
#: Which of a dense head's outputs are boxes.
BOXES = 1


@MODELS.register_module()
class BoxTerm(Term):
    r"""Decoded boxes of two dense heads, anchor by anchor.

    .. math:: L = \lambda \frac{\sum_a w_a (1 - GIoU(b^S_a, b^T_a))}{Z}

    over the anchors a of all cells, levels and images. Both sides are decoded
    by their own heads, so that one may predict distances, offsets or
    distributions and the other something else; number and place of the
    anchors must be the same.

    Args:
        teacher: Name of the teacher.
        weight: Config of what says how much each anchor counts, of
            ``mmkd.weights``.
        normalise_by: What Z is, at least 1: ``'positives'``, the anchors that
            the student's own assignment found, averaged over the processes,
            or ``'weight'``, the sum of w in this one, for heads that assign no
            labels level by level.
        tap: The dense head of the student.
        teacher_tap: That of the teacher; as the student's if None.
        loss_weight: The outer factor. Published: 4.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a head gives no boxes that can be read, or strides or
            numbers of anchors differ, while the model is built.

    Reference:
        Yang et al., "Bridging Cross-task Protocol Inconsistency for
        Distillation in Dense Object Detection", ICCV 2023, arXiv:2308.14286.
        Read: the authors' head and config
        (https://github.com/TinyTigerPan/BCKD), not the paper. There a level
        without positives has no distillation; here every level has.
    """

    def __init__(
        self,
        teacher: str,
        weight: Mapping | None = None,
        normalise_by: str = 'positives',
        tap: str = 'bbox_head',
        teacher_tap: str | None = None,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_name('BoxTerm', 'normalise_by', normalise_by, NORMALISERS)
        self.teacher, self.head = teacher, tap
        self.teacher_head = teacher_tap or tap
        self.normalise_by, self.loss_weight = normalise_by, loss_weight
        weight = weight or dict(type='mmkd.DisagreementWeight', tap=tap)
        self.weight = build(weight, 'weight')

    def silent(self) -> bool:
        return not self.loss_weight

    def compares_classes(self) -> bool:
        return self.weight.needs_classes

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        self.tap(student, self.head)
        teacher.tap(self.teacher_head)
        own, _ = resolve(student, self.head)
        other, _ = resolve(teacher.detector, self.teacher_head)
        check_decodable('BoxTerm', own, 'student')
        check_decodable('BoxTerm', other, 'teacher')
        check_same_anchors('BoxTerm', own, other)
        if self.normalise_by == 'positives':
            check_assigns('BoxTerm', own, "Set normalise_by='weight'.")
            self.tap(student, f'{self.head}.get_targets')
        self.weight.bind(self, student, teacher)

    def forward(self, step: Step) -> Tensor:
        own, _ = resolve(step.student.detector, self.head)
        shown = step.teacher(self.teacher)
        other, _ = resolve(shown.detector, self.teacher_head)
        student = decode(own, _maps(step.student.at(self.head)))
        teacher = decode(other, _maps(shown.at(self.teacher_head)))
        teacher = crop(teacher, shown.size, step.images.shape[-2:])
        loss = count = 0.0
        for one, like, weight in zip(student, teacher, self.weight(step)):
            error = giou_error(one, like.detach(), axis=2)
            weight = weight.expand_as(error)
            loss = loss + (weight * error).sum()
            count = count + weight.sum()
        if self.normalise_by == 'positives':
            labels = assigned_labels(step, self.head)
            count = count_positives(labels, own.num_classes)
        return self.loss_weight * loss / count.clamp(min=1)


def _maps(outputs: Tensor) -> tuple[Tensor, ...]:
    return maps_of(outputs, 'BoxTerm', BOXES)
