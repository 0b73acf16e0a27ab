"""Cross-head of queries: the student's states, read by the teacher's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmkd.build import build
from mmkd.losses.bckd import bckd_class_loss
from mmkd.losses.query import (
    query_box_errors,
    query_class_divergence,
    weighted_mean,
)
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.terms.cross_head import rescale
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import (
    DECODER,
    HEAD,
    Answers,
    answers,
    bind_queries,
    own_queries,
)
from mmkd.terms.query_pairs import matched
from mmkd.terms.shared_queries import confidence
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class CrossQueryTerm(Term):
    r"""The student's queries, told by the branches of the teacher's head.

    Each layer j of the teacher's frozen head reads what the student's decoder
    makes of its queries in the layer of the same depth, the last in the last.
    It is brought to the mean and deviation of the teacher's, channel by
    channel over all queries of the batch, and comes with the student's own
    reference points. What is read, :math:`\hat z` and :math:`\hat b`, is
    matched with what the teacher itself says, one to one, by the last layer,
    and compared:

    .. math::
        cls &= \frac{1}{M} \sum_j \sum_q \sum_c |\sigma(\hat z_{qc}) -
               \sigma(z_{qc})|^\beta \, BCE(\hat z_{qc}, \sigma(z_{qc})) \\
        box &= \sum_j \frac{\sum_q w_q \left( \lambda_1 \lVert \hat b_q - b_q
               \rVert_1 + \lambda_2 (1 - GIoU(\hat b_q, b_q)) \right)}
               {\sum_q w_q}, \qquad w_q = \max_c p_{qc}

    M is the number of objects, p the chances of the teacher's last layer. Of
    a teacher with a softmax the class part is its divergence, weighted like
    the box. The student's own predictions see the ground truth alone: no
    gradient reaches its head, nor the reference points.

    The teacher's head decides on classes, so that the student's may be
    others.

    Args:
        teacher: Name of the teacher.
        class_weight: Factor of ``cls``.
        l1_weight, giou_weight: Of both distances of boxes.
        power: Exponent of the difference, at least 1.
        align: Config of the neck that brings the student's states to the
            teacher's width, for instance ``ConvAdapt``; none if None.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``cls`` and ``box``.

    Raises:
        ValueError: If a detector has no queries, states differ in width, or
            the teacher's head reads reference points that the student has
            not, while the model is built.

    Reference:
        Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object
        Detection", CVPR 2024, arXiv:2306.11369, which is about dense heads,
        see :class:`mmkd.terms.cross_head.CrossHeadTerm`. All that is said of
        queries is ours.
    """

    def __init__(
        self,
        teacher: str,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        power: float = 1.0,
        align: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        if not power >= 1:
            raise ValueError(
                f'CrossQueryTerm needs power >= 1, for below the gradient is '
                f'infinite where both sides agree; got power={power!r}.'
            )
        self.teacher = teacher
        self.class_weight = class_weight
        self.l1_weight, self.giou_weight = l1_weight, giou_weight
        self.power = power
        self.align = (
            None if align is None else build(align, 'align', num_levels=1)
        )

    def silent(self) -> bool:
        return not (self.class_weight or self.l1_weight or self.giou_weight)

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        bind_queries(self, student, teachers, self.teacher)

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        known = answers(shown).detach()
        with full_precision(step.images):
            crossed = self._crossed(step.student, shown, known)
            pairs = matched(crossed, known)
            own, other = pairs.student, pairs.teacher
            weight = confidence(pairs.teacher)
            l1, error = query_box_errors(own.boxes, other.boxes)
            boxes = self.l1_weight * l1 + self.giou_weight * error
            return dict(
                cls=self.class_weight
                * self._classes(step, own, other, weight),
                box=sum(weighted_mean(layer, weight) for layer in boxes),
            )

    def _classes(
        self, step: Step, own: Answers, other: Answers, weight: Tensor
    ) -> Tensor:
        logits, targets = as_float(own.logits), as_float(other.logits)
        if other.softmax:
            classes = query_class_divergence(logits, targets, softmax=True)
            return sum(weighted_mean(layer, weight) for layer in classes)
        found = bckd_class_loss(
            logits.flatten(0, 2), targets.flatten(0, 2), self.power
        )
        objects = found.new_full((), len(step.gt.labels))
        return found.sum() / reduce_mean(objects).clamp(min=1)

    def _crossed(
        self, student: Outputs, shown: Outputs, known: Answers
    ) -> Answers:
        """What the teacher's head says of the student's queries."""
        own = answers(student).states
        layers = uniform_map(len(known.states), len(own))
        states = torch.stack(
            [
                self._like(own[layer], other)
                for layer, other in zip(layers, known.states)
            ]
        )
        head = getattr(shown.detector, HEAD)
        logits, boxes = head(
            hidden_states=states.to(next(head.parameters()).dtype),
            **_references(student, shown, layers),
        )[:2]
        return Answers(logits, boxes, states, known.softmax)

    def _like(self, own: Tensor, other: Tensor) -> Tensor:
        """States with the teacher's width, mean and deviation, (N, Q, D)."""
        own, other = (as_float(one).mT[..., None] for one in (own, other))
        if self.align is not None:
            (own,) = self.align((own,), (other,))
        widths = own.shape[1], other.shape[1]
        if widths[0] != widths[1]:
            raise ValueError(
                f"CrossQueryTerm lets the teacher's head read the student's "
                f'queries, but these have {widths[0]} numbers and those of '
                f"the teacher {widths[1]}. Add align=dict(type='mmkd."
                f"ConvAdapt', in_channels={widths[0]}, "
                f'out_channels={widths[1]}) to this term.'
            )
        return rescale(own, other)[..., 0].mT


def _references(
    student: Outputs, shown: Outputs, layers: Sequence[int]
) -> dict[str, Any]:
    """The student's reference points, as the teacher's head takes its own.

    Args:
        student, shown: What both sides recorded.
        layers: Of the student's decoder, one for each of the teacher's.
    """
    form = shown.at(DECODER).get('references')
    if form is None:
        return {}
    own = _points(student, max(layers) + 1)
    wanted = [one.shape[-1] for one in _points(shown, len(layers))]
    found = [own[layer].shape[-1] for layer in layers] if own else []
    if found != wanted:
        raise ValueError(
            f"CrossQueryTerm: the teacher's head reads reference points of "
            f'{_count(wanted)} coordinates by layer, but the student, '
            f'{type(student.detector).__name__}, has those of '
            f'{_count(found)}. Use mmkd.QueryFeatureTerm for this pair, or '
            f'choose decoders of one kind.'
        )
    points = [own[layer].detach() for layer in layers]
    if not isinstance(form, Tensor):
        return dict(references=points)
    whole = form.dim() == 3  # the same in all layers
    return dict(references=points[0] if whole else torch.stack(points))


def _points(outputs: Outputs, count: int) -> list[Tensor]:
    """Reference points of a detector's own queries, layer by layer."""
    given = outputs.at(DECODER).get('references')
    if given is None:
        return []
    if isinstance(given, Tensor) and given.dim() == 3:
        given = [given] * count
    own = own_queries(outputs.detector, given[0].shape[1])
    return [one[:, own] for one in given][:count]


def _count(coordinates: Sequence[int]) -> str:
    return ', '.join(map(str, coordinates)) or 'no'
