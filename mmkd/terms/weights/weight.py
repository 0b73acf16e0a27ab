"""What every weight shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from mmkd.structures import Step
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


class Weight(nn.Module, ABC):
    """How much each cell of the maps that a term compares counts.

    A subclass notes in :meth:`bind` what it reads and gives its maps in
    :meth:`forward`. They are no path for gradients.

    Attributes:
        needs_classes: Whether it takes classes of the teacher for those of
            the student, so that they must be the same.
    """

    teacher: str
    needs_classes: ClassVar[bool] = False

    @abstractmethod
    def bind(self, term: Term, student: nn.Module, teacher: Teacher) -> None:
        """Note the outputs that are read, by ``term.tap`` and
        ``teacher.tap``.

        Raises:
            ValueError: If a name is unknown, or the detector has no such
                part.
        """

    @abstractmethod
    def forward(self, step: Step) -> Sequence[Tensor]:
        """Weights of at least 0, (N, 1, H, W) a level of the tapped output.

        Of a head with A anchors a cell, (N, A, H, W).
        """
