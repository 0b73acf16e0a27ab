"""Positive: the cells that the student's own loss holds for objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of, resolve
from mmkd.terms.assignment import assigned_labels, check_assigns
from mmkd.terms.term import Term
from mmkd.terms.weights.weight import Weight

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: What to type for a head that assigns no labels.
INSTEAD = "Use weight=dict(type='mmkd.ScoreWeight')."


@MODELS.register_module()
class PositiveWeight(Weight):
    r"""One where the student's label assignment put an object, 0 elsewhere.

    The assignment is read, not repeated: it is what the student's own loss
    computed in this step.

    .. math:: w_i = [label_i \text{ is a class}] \; \max_c \sigma(z^S_{ic})

    Args:
        tap: The student's dense head.
        score: Let a positive count as much as the student believes in its
            likeliest class, as GFL's box losses do; else 1.

    Raises:
        ValueError: If the head assigns no labels to anchors.

    Reference:
        Zheng et al., "Localization Distillation for Dense Object Detection",
        CVPR 2022, arXiv:2102.12252, call it the main distillation region
        (read: MMDetection's LDHead, which weighs likewise).
    """

    def __init__(self, tap: str = 'bbox_head', score: bool = True) -> None:
        super().__init__()
        self.tap, self.score = tap, score

    @property
    def targets(self) -> str:
        """The method whose output is the assignment."""
        return f'{self.tap}.get_targets'

    def bind(self, term: Term, student: nn.Module, teacher: Teacher) -> None:
        self.teacher = teacher.name
        head, _ = resolve(student, self.tap)
        check_assigns(type(self).__name__, head, INSTEAD, places=True)
        term.tap(student, self.tap)
        term.tap(student, self.targets)

    @torch.no_grad()
    def forward(self, step: Step) -> Sequence[Tensor]:
        classes = getattr(step.student.detector, self.tap).num_classes
        who = f'The tap {self.tap!r}'
        scores = maps_of(step.student.at(self.tap), who, 0)
        labels = assigned_labels(step, self.tap)
        weights = []
        for score, label in zip(scores, labels):
            cells = spread(label, score)
            weight = ((cells >= 0) & (cells < classes)).to(torch.float32)
            if self.score:
                weight = weight * best(score, weight.shape[1])
            weights.append(weight)
        return weights


def spread(values: Tensor, feature: Tensor) -> Tensor:
    """Values of a level's anchors as maps, (N, A, H, W).

    Args:
        values: (N, H·W·A) or (N·H·W·A,), the anchors of a cell together.
        feature: Any map of the level, (N, C, H, W).

    Example:
        >>> spread(torch.arange(8), torch.zeros(1, 9, 2, 2))[0, 1].tolist()
        [[1, 3], [5, 7]]
    """
    height, width = feature.shape[-2:]
    maps = values.reshape(len(feature), height, width, -1)
    return maps.permute(0, 3, 1, 2)


def best(scores: Tensor, anchors: int) -> Tensor:
    """Largest class probability of each anchor, (N, A, H, W).

    Args:
        scores: Logits, (N, A·C, H, W).
        anchors: A.
    """
    height, width = scores.shape[-2:]
    classes = as_float(scores).reshape(len(scores), anchors, -1, height, width)
    return classes.amax(2).sigmoid()
