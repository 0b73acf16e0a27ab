"""GO-LSD: the last layer of a decoder teaches the layers before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.losses.query import query_box_errors, query_class_divergence
from mmkd.ops.boxes import corners, iou
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.terms.queries import (
    DECODER,
    HEAD,
    Answers,
    answers,
    check_asks,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: What gives each query its object, layer by layer.
TARGETS = f'{HEAD}.get_targets'


@MODELS.register_module()
class LayerSelfTeachingTerm(Term):
    r"""Each layer's queries imitate what the last layer makes of them.

    There is no teacher. Within one decoder query i is the same query in every
    layer, so that layers are compared query by query. Those that any layer
    matched to an object, K_m of them, count by the IoU of their final box with
    it, the K_u others by their final confidence, and the groups by the roots
    of their sizes, so that the few are not drowned by the many:

    .. math::
        L = \frac{1}{\sqrt{K_m} + \sqrt{K_u}} \sum_{l < L} \left(
            \frac{\sqrt{K_m}}{K_m} \sum_{matched} IoU_i \, D(l, i)
            + \frac{\sqrt{K_u}}{K_u} \sum_{others} p_i \, D(l, i) \right)

    D is the distance of a query's answer in layer l from that in the last
    one, which gets no gradient: DETR's two distances of boxes, and if asked
    for the divergence of classes.

    Denoising and auxiliary queries are left out. Objects are those that the
    student's own loss has matched; nothing is matched again.

    Args:
        l1_weight, giou_weight: Of the distances of boxes. DETR's by default.
        class_weight: Of the divergence of classes. 0 in the paper, whose
            method is about locations.
        temperature: Of the classes.
        loss_weight: Factor of the whole.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``box`` and, if weighted, ``cls``.

    Raises:
        ValueError: If the student asks by no queries, has one layer alone, or
            keeps other queries in each layer, while the model is built.

    Reference:
        Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained
        Distribution Refinement", ICLR 2025, arXiv:2410.13842, the section on
        global optimal localization self-distillation. Read: summaries; no
        code. There D is the divergence of the distributions of a box's edges,
        which MMDetection's heads of queries do not have; ours are DETR's
        distances in its place, the classes, and means where the paper has
        sums, so that the weight does not hang on the number of queries. A
        query that layers matched to different objects has that of the last of
        them.
    """

    from_nothing = ('box',)

    def __init__(
        self,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_weight: float = 0.0,
        temperature: float = 1.0,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive('LayerSelfTeachingTerm', temperature=temperature)
        self.l1_weight, self.giou_weight = l1_weight, giou_weight
        self.class_weight, self.temperature = class_weight, temperature
        self.loss_weight = loss_weight

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_asks('LayerSelfTeachingTerm', student, 'student')
        if hasattr(student, 'cache_dict'):
            raise ValueError(
                f'LayerSelfTeachingTerm compares a query with itself in the '
                f'next layer, but each layer of {type(student).__name__} goes '
                f'on with other queries. Use it for DETR, Conditional, DAB or '
                f'Deformable DETR, or DINO.'
            )
        for path in (DECODER, HEAD, TARGETS):
            self.tap(student, path)

    def silent(self) -> bool:
        boxes = self.l1_weight or self.giou_weight
        return not (self.loss_weight and (boxes or self.class_weight))

    def forward(self, step: Step) -> dict[str, Tensor]:
        given = answers(step.student)
        count = len(given.logits)
        if count < 2:
            raise ValueError(
                f'LayerSelfTeachingTerm needs a decoder of several layers '
                f'whose answers are all returned, '
                f'{type(step.student.detector).__name__} gives {count}. Set '
                f'return_intermediate=True in its decoder.'
            )
        classes = getattr(step.student.detector, HEAD).num_classes
        found = step.student.at(TARGETS)[:count]
        labels = torch.stack([torch.stack(list(one[0])) for one in found])
        boxes = torch.stack([torch.stack(list(one[2])) for one in found])
        matched = (labels >= 0) & (labels < classes)  # L, N, Q
        weight = self._weights(given, matched, boxes)
        last = given.detach()
        l1, error = query_box_errors(given.boxes[:-1], last.boxes[-1:])
        distance = self.l1_weight * l1 + self.giou_weight * error
        shares = dict(box=self.loss_weight * (distance * weight).sum())
        if self.class_weight:
            distance = query_class_divergence(
                given.logits[:-1],
                last.logits[-1:],
                given.softmax,
                self.temperature,
            )
            factor = self.loss_weight * self.class_weight
            shares['cls'] = factor * (distance * weight).sum()
        return shares

    @torch.no_grad()
    def _weights(
        self, given: Answers, matched: Tensor, boxes: Tensor
    ) -> Tensor:
        """How much each query counts in each layer, (N, Q)."""
        target = boxes[0]
        for layer, one in zip(matched[1:], boxes[1:]):
            target = torch.where(layer[..., None], one, target)
        union = matched.any(0)
        near = iou(corners(given.boxes[-1]), corners(target)) * union
        trust = given.chances[-1].amax(-1) * ~union
        counts = [one.sum().float() for one in (union, ~union)]
        total = sum(one.sqrt() for one in counts)
        return (
            sum(
                weight / one.clamp(min=1).sqrt()
                for weight, one in zip((near, trust), counts)
            )
            / total
        )
