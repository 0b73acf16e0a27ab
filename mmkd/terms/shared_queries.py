"""KD-DETR: both decoders are asked the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.losses.query import (
    query_box_errors,
    query_class_divergence,
    weighted_mean,
)
from mmkd.ops.numeric import full_precision
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.structures.constants import constant
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import (
    Answers,
    answers,
    ask,
    bind_queries,
    drawn,
    question,
)
from mmkd.terms.query_matching import class_logits
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: What is compared of two answers.
PARTS = ('cls', 'l1', 'giou')


@MODELS.register_module()
class SharedQueryTerm(Term):
    r"""Student and teacher answer the same queries, layer by layer.

    .. math::
        \sum_l \frac{\sum_q w_q \left(
            \lambda_{cls} D(p^T_{lq}, p^S_{lq})
            + \lambda_{l1} \lVert b^T_{lq} - b^S_{lq} \rVert_1
            + \lambda_{giou} (1 - GIoU(b^T_{lq}, b^S_{lq}))
        \right)}{\sum_q w_q}, \quad
        w_q = \max_c p^T_{Lqc}

    D is :func:`query_class_divergence`, L the last layer, and c no background.
    The queries q are of two kinds, each with a sum of its own. General ones
    are drawn anew in each step, all over the image; they ask what nobody
    looks for. Specific ones are the teacher's own; they ask where it knows
    most. The student decodes them beside its own queries, in passes of their
    own: queries of one pass attend to each other, and so neither kind sees
    the other or the student's. The teacher's answers to its own queries are
    there already.

    Layers are paired last with last. Nothing depends on the order of queries,
    and the two detectors may have different numbers of them.

    Args:
        teacher: Name of the teacher.
        general: Queries drawn for each image; 0 for none.
        specific: Whether the teacher's own queries are asked.
        cls_weight, l1_weight, giou_weight: Of each distance, DETR's by
            default.
        temperature: Divides class logits.
        loss_weight: Factor of all parts.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``general_cls``, ``general_l1``, ``general_giou``, and the same of
        ``specific``.

    Raises:
        ValueError: If a detector has no queries, decoders take queries of
            other forms or widths, or neither kind is asked, while the model
            is built.

    Reference:
        Wang et al., "KD-DETR: Knowledge Distillation for Detection
        Transformer with Consistent Distillation Points Sampling", CVPR 2024,
        arXiv:2211.08071. Read: a summary; no code. Ours: the mean over the
        weights; divergences of two Bernoulli distributions for heads with
        sigmoids; what is drawn, see :func:`mmkd.terms.queries.drawn`. Not
        here: teachers with queries for students without.
    """

    def __init__(
        self,
        teacher: str,
        general: int = 300,
        specific: bool = True,
        cls_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        temperature: float = 1.0,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive('SharedQueryTerm', temperature=temperature)
        if general < 0 or not (general or specific):
            raise ValueError(
                f'SharedQueryTerm asks general={general} queries drawn for '
                f'each image and specific={specific} ones of the teacher, '
                f'which leaves none. Set general=300, or specific=True.'
            )
        self.teacher, self.general, self.specific = teacher, general, specific
        self.weights = cls_weight, l1_weight, giou_weight
        self.temperature, self.loss_weight = temperature, loss_weight

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        bind_queries(self, student, teachers, self.teacher)

    def silent(self) -> bool:
        return not (self.loss_weight and any(self.weights))

    def compares_classes(self) -> bool:
        return True

    def forward(self, step: Step) -> dict[str, Tensor]:
        student, teacher = step.student, step.teacher(self.teacher)
        pairs = {}
        if self.general:
            with torch.no_grad():
                asked = drawn(teacher, self.general)
                known = ask(teacher, asked)
            pairs['general'] = ask_alike(student, asked), known
        if self.specific:
            asked = question(teacher)
            pairs['specific'] = ask_alike(student, asked), answers(teacher)
        return {
            f'{kind}_{part}': self.loss_weight * weight * value
            for kind, (own, known) in pairs.items()
            for weight, (part, value) in zip(
                self.weights,
                answer_distances(
                    own, known, confidence(known), self.temperature
                ).items(),
            )
        }


def ask_alike(outputs: Outputs, asked: Mapping[str, Tensor]) -> Answers:
    """What a detector says of questions that another was asked.

    They are cast to its own precision and give no gradient to who made them.
    """
    own = question(outputs)
    return ask(
        outputs,
        {
            key: one.detach().to(own[key].dtype) if key in own else one
            for key, one in asked.items()
        },
    )


def confidence(known: Answers) -> Tensor:
    """How sure the last layer is that a query has found something, (N, Q)."""
    return known.chances[-1].amax(-1).detach()


def answer_distances(
    student: Answers,
    teacher: Answers,
    weight: Tensor,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """How far two detectors' answers to the same questions are apart.

    Args:
        student: Of L layers.
        teacher: Of any number of them, paired last with last; no gradient
            reaches it.
        weight: Of each query, (N, Q).
        temperature: Divides class logits.

    Returns:
        ``cls``, ``l1`` and ``giou``: weighted means over the queries, summed
        over the student's layers.

    Raises:
        ValueError: If the classes differ in number.
    """
    teacher = teacher.detach()
    student_classes, teacher_classes, softmax = class_logits(student, teacher)
    if student_classes.shape[-1] != teacher_classes.shape[-1]:
        raise ValueError(
            f'Answers to shared queries are compared class by class; the '
            f"student's head has {student_classes.shape[-1]} outputs, the "
            f"teacher's {teacher_classes.shape[-1]}. Choose a teacher of the "
            f'same classes, or a term on features.'
        )
    places = constant(
        uniform_map(len(student.boxes), len(teacher.boxes)),
        teacher.boxes,
        torch.long,
    )
    with full_precision(student.boxes):
        classes = query_class_divergence(
            student_classes, teacher_classes[places], softmax, temperature
        )
        errors = query_box_errors(student.boxes, teacher.boxes[places])
        return {
            part: sum(weighted_mean(layer, weight) for layer in value)
            for part, value in zip(PARTS, (classes, *errors))
        }
