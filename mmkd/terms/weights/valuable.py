"""Valuable: anchors near an object that the assignment leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mmdet.models.dense_heads import ATSSHead, GFLHead, TOODHead
from torch import Tensor, nn

from mmkd.checks import check_fraction, check_positive
from mmkd.ops.anchors import valuable_region
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of, resolve
from mmkd.terms.assignment import by_level
from mmkd.terms.term import Term
from mmkd.terms.weights.positive import PositiveWeight, spread

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Methods of mmdet's heads whose targets hold the anchors.
ANCHORED = (
    ATSSHead.get_targets,
    GFLHead.get_targets,
    TOODHead.get_targets,
)


@MODELS.register_module()
class ValuableWeight(PositiveWeight):
    """IoU of the anchors near an object that are not positive, else 0.

    Args:
        tap: The student's dense head; one whose targets hold its anchors, as
            those of ATSS and GFL do.
        topk: Anchors a level from which a box's threshold follows, as in
            ATSS.
        ratio: The lower end of the region, relative to the upper.

    Raises:
        ValueError: If the head assigns no labels to anchors, or its targets
            do not hold them.

    Reference:
        As :func:`~mmkd.ops.anchors.valuable_region`.
    """

    def __init__(
        self, tap: str = 'bbox_head', topk: int = 9, ratio: float = 0.25
    ) -> None:
        super().__init__(tap, score=False)
        check_positive('ValuableWeight', topk=topk)
        check_fraction('ValuableWeight', ratio=ratio)
        self.topk, self.ratio = topk, ratio

    def bind(self, term: Term, student: nn.Module, teacher: Teacher) -> None:
        super().bind(term, student, teacher)
        head, _ = resolve(student, self.tap)
        given = type(head).get_targets
        # RTMDet's points are four numbers, too, and look like anchors.
        if given.__module__.startswith('mmdet.') and given not in ANCHORED:
            raise self._without(head)

    @torch.no_grad()
    def forward(self, step: Step) -> Sequence[Tensor]:
        targets = step.student.at(self.targets)
        who = f'The tap {self.tap!r}'
        scores = maps_of(step.student.at(self.tap), who, 0)
        boxes = by_level(targets, integers=False)
        if any(one.dim() != 3 or one.shape[-1] != 4 for one in boxes):
            raise self._without(getattr(step.student.detector, self.tap))
        anchors = [one[0] for one in boxes]
        found = valuable_region(anchors, step.gt, self.topk, self.ratio)
        return [
            (positive == 0) * spread(one, score)
            for positive, one, score in zip(
                super().forward(step), found, scores
            )
        ]

    def _without(self, head: nn.Module) -> ValueError:
        return ValueError(
            f"ValuableWeight reads anchors among the targets of the student's "
            f'{self.tap}, where ATSS, GFL and TOOD have them; '
            f'{type(head).__name__} has none. Use '
            f"weight=dict(type='mmkd.PositiveWeight')."
        )
