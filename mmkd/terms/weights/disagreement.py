"""Disagreement: a cell counts as much as the two detectors differ there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.term import Term
from mmkd.terms.weights.score import refuse_softmax
from mmkd.terms.weights.weight import Weight

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class DisagreementWeight(Weight):
    r"""The largest difference of class probabilities, anchor by anchor.

    .. math:: w_a = \max_c |\sigma(z^T_{ac}) - \sigma(z^S_{ac})|^{power}

    Cells of the padded border and in ignored boxes get 0.

    Args:
        tap: Dense head of both, whose first output are class scores.
        power: Exponent.

    Raises:
        ValueError: If ``power`` is not positive, or a head has scores that
            are not a sigmoid each.

    Reference:
        Yang et al., "Bridging Cross-task Protocol Inconsistency for
        Distillation in Dense Object Detection", ICCV 2023, arXiv:2308.14286,
        weigh their box distillation so (read: the authors' head).
    """

    needs_classes = True

    def __init__(self, tap: str = 'bbox_head', power: float = 1.0) -> None:
        super().__init__()
        check_positive('DisagreementWeight', power=power)
        self.tap, self.power = tap, power

    def bind(self, term: Term, student: nn.Module, teacher: Teacher) -> None:
        self.teacher = teacher.name
        term.tap(student, self.tap)
        teacher.tap(self.tap)
        for detector, side in (
            (student, 'student'),
            (teacher.detector, 'teacher'),
        ):
            refuse_softmax('DisagreementWeight', detector, self.tap, side)
        head, _ = resolve(student, self.tap)
        self.classes = head.cls_out_channels

    @torch.no_grad()
    def forward(self, step: Step) -> Sequence[Tensor]:
        who = f'The tap {self.tap!r}'
        shown = step.teacher(self.teacher)
        own, other = (
            maps_of(one.at(self.tap), who, 0) for one in (step.student, shown)
        )
        other = crop(other, shown.size, step.images.shape[-2:])
        return [
            equal_weight(step.gt, one) * self._largest(one, like) ** self.power
            for one, like in zip(own, other)
        ]

    def _largest(self, one: Tensor, other: Tensor) -> Tensor:
        difference = as_float(one).sigmoid() - as_float(other).sigmoid()
        return difference.abs().unflatten(1, (-1, self.classes)).amax(2)
