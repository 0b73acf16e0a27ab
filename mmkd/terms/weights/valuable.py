"""Valuable: anchors near an object that the assignment leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkd.checks import check_fraction, check_positive
from mmkd.ops.anchors import valuable_region
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of
from mmkd.terms.weights.positive import PositiveWeight, by_level, spread


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
        ValueError: If the head assigns no labels to anchors.

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

    @torch.no_grad()
    def forward(self, step: Step) -> Sequence[Tensor]:
        targets = step.student.at(self.targets)
        who = f'The tap {self.tap!r}'
        scores = maps_of(step.student.at(self.tap), who, 0)
        anchors = [one[0] for one in by_level(targets, integers=False)]
        found = valuable_region(anchors, step.gt, self.topk, self.ratio)
        return [
            (positive == 0) * spread(one, score)
            for positive, one, score in zip(
                super().forward(step), found, scores
            )
        ]
