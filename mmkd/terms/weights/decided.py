"""Decided: the cells of which the student's own loss says what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of, resolve
from mmkd.terms.assignment import by_level, check_assigns
from mmkd.terms.term import Term
from mmkd.terms.weights.positive import INSTEAD, spread
from mmkd.terms.weights.weight import Weight

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class DecidedWeight(Weight):
    """One where some anchor is an object or background, 0 where all are open.

    The student's label assignment is read, not repeated. Where it leaves all
    anchors of a cell open, because their overlap with an object lies between
    two thresholds, they lie in an ignored box, or beyond the image, nothing
    counts. That is 1 nearly everywhere, and everywhere for heads that leave
    nothing open.

    Args:
        tap: The student's dense head.

    Raises:
        ValueError: If the head assigns no labels to anchors.

    Reference:
        Wang et al., "Distilling Knowledge by Mimicking Features", IEEE TPAMI
        2022, arXiv:2011.01424, compare RetinaNet's features so (read: a
        summary of the authors' code).
    """

    def __init__(self, tap: str = 'bbox_head') -> None:
        super().__init__()
        self.tap = tap

    def bind(self, term: Term, student: nn.Module, teacher: Teacher) -> None:
        self.teacher = teacher.name
        head, _ = resolve(student, self.tap)
        check_assigns('DecidedWeight', head, INSTEAD, places=True)
        term.tap(student, self.tap)
        term.tap(student, f'{self.tap}.get_targets')

    @torch.no_grad()
    def forward(self, step: Step) -> Sequence[Tensor]:
        scores = maps_of(step.student.at(self.tap), f'The tap {self.tap!r}', 0)
        targets = step.student.at(f'{self.tap}.get_targets')
        return [
            (spread(anchors, score) > 0).to(torch.float32).amax(1, True)
            for anchors, score in zip(label_weights(targets), scores)
        ]


def label_weights(targets: Sequence[Any]) -> Sequence[Tensor]:
    """Of what a head's ``get_targets`` returned, the weights of the labels.

    They are the first real numbers of the labels' shape, level by level; ones
    where a head has none.

    Example:
        >>> labels, weights = torch.tensor([[1, 0]]), torch.tensor([[1.0, 0]])
        >>> boxes = torch.zeros(1, 2, 4)
        >>> label_weights(([boxes], [labels], [weights], [boxes]))
        [tensor([[1., 0.]])]
    """
    labels = by_level(targets, integers=True)
    shapes = [one.shape for one in labels]
    for one in targets:
        if (
            isinstance(one, (list, tuple))
            and all(isinstance(level, Tensor) for level in one)
            and [level.shape for level in one] == shapes
            and one[0].is_floating_point()
        ):
            return one
    return [torch.ones_like(one, dtype=torch.float32) for one in labels]
