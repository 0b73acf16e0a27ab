"""Score: a cell counts as much as a detector believes in an object there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.ops.numeric import as_float
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.term import Term
from mmkd.terms.weights.weight import Weight

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

SIDES = ('teacher', 'student')


@MODELS.register_module()
class ScoreWeight(Weight):
    r"""The largest class probability at each cell, over classes and anchors.

    .. math:: w_{ij} = \max_c \sigma(z_{cij})^{power}

    Args:
        side: Whose scores, ``'teacher'`` or ``'student'``.
        tap: Head whose class scores are read; ``'rpn_head'`` of a two-stage
            detector.
        output: Which of its outputs they are.
        power: Exponent; less than 1 lets unlikely cells count more.

    Raises:
        ValueError: If an argument is out of range, or the head has scores
            that are not a sigmoid each.

    Reference:
        Du et al., "Distilling Object Detectors with Feature Richness",
        NeurIPS 2021, arXiv:2111.00674, call the teacher's the richness of a
        feature (read: the abstract, and a summary of the authors' code).
    """

    def __init__(
        self,
        side: str = 'teacher',
        tap: str = 'bbox_head',
        output: int = 0,
        power: float = 1.0,
    ) -> None:
        super().__init__()
        check_name('ScoreWeight', 'side', side, SIDES)
        check_positive('ScoreWeight', power=power)
        self.side, self.tap, self.output = side, tap, output
        self.power = power

    def bind(self, term: Term, student: nn.Module, teacher: Teacher) -> None:
        self.teacher = teacher.name
        if self.side == 'student':
            term.tap(student, self.tap)
        else:
            teacher.tap(self.tap)
        detector = student if self.side == 'student' else teacher.detector
        refuse_softmax('ScoreWeight', detector, self.tap, self.side)

    @torch.no_grad()
    def forward(self, step: Step) -> Sequence[Tensor]:
        shown = (
            step.student
            if self.side == 'student'
            else step.teacher(self.teacher)
        )
        maps = maps_of(
            shown.at(self.tap), f'The tap {self.tap!r}', self.output
        )
        maps = crop(maps, shown.size, step.images.shape[-2:])
        return [
            as_float(one).amax(1, keepdim=True).sigmoid() ** self.power
            for one in maps
        ]


def refuse_softmax(who: str, detector: nn.Module, tap: str, side: str) -> None:
    """A head must score each class by itself.

    Raises:
        ValueError: If it has a softmax over classes and background.
    """
    head, _ = resolve(detector, tap)
    if not getattr(head, 'use_sigmoid_cls', True):
        raise ValueError(
            f'{who} reads scores that are a sigmoid each, but the '
            f"{side}'s {tap} ({type(head).__name__}) has a softmax over "
            f'classes and background. Use another weight=, or none.'
        )
