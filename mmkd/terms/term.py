"""A summand of the objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mmengine.dist import is_distributed
from torch import Tensor, nn

from mmkd.build import build, find
from mmkd.registry import SCHEDULES
from mmkd.schedules import Constant
from mmkd.structures import Step
from mmkd.taps import resolve

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


class Term(nn.Module, ABC):
    """What every summand shares: taps, a schedule, and a share of the loss.

    A subclass says in :meth:`bind` which outputs it needs and computes its
    share in :meth:`forward`. It holds no reference to student or teachers:
    they come with each :class:`Step`.

    Args:
        schedule: Factor over the training, of ``mmkd.schedules``; constant 1
            if None.

    Attributes:
        from_nothing: Patterns of parts that compare what begins alike, so
            that they begin near 0 and rise before they can fall.
    """

    from_nothing: ClassVar[tuple[str, ...]] = ()

    def __init__(self, schedule: Mapping | None = None) -> None:
        super().__init__()
        self.schedule = (
            Constant()
            if schedule is None
            else build(schedule, 'schedule', SCHEDULES)
        )
        self.name = type(self).__name__
        self.student_paths: list[str] = []
        self.teacher_names: list[str] = []

    @abstractmethod
    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        """Note the outputs the term needs, by :meth:`tap` and
        ``teacher.tap``.

        Raises:
            ValueError: If a name is unknown.
        """

    @abstractmethod
    def forward(self, step: Step) -> Tensor | dict[str, Tensor]:
        """The term's share of the loss, without its schedule.

        Returns:
            A scalar, or parts by name. A part whose name starts with
            ``watch_`` is logged and not summed.
        """

    def initialise(self) -> None:
        """Give detectors of its own the weights that they begin with.

        Called when the student has got its own, in a random state that is
        put back; a resumed training then reads those of the checkpoint.
        """

    def tap(self, student: nn.Module, path: str) -> None:
        """Note an output of the student that the term needs."""
        resolve(student, path)
        if path not in self.student_paths:
            self.student_paths.append(path)

    def silent(self) -> bool:
        """Whether its weight is 0, so that it need not run at all."""
        return False

    def compares_classes(self) -> bool:
        """Whether classes of student and teacher must mean the same."""
        return False

    def takes_some_classes(self) -> bool:
        """Whether a term that compares classes can do so by those alone that
        a teacher shares with the student.

        One that can leaves out the student's other classes itself, by
        ``teacher.shared``, which it finds in :meth:`bind`.
        """
        return False

    def checkable(self, step: Step) -> bool:
        """Whether a dry forward pass recorded all that the term needs."""
        return all(step.student.has(path) for path in self.student_paths)

    def idle(self) -> Tensor | float:
        """The share of a term that does not count in a step: nothing.

        Alone, its weights get no gradient at all, so that not even the norm
        that gradients are clipped by is rounded otherwise; DDP waits for one.
        """
        return self.touch() if is_distributed() else 0.0

    def touch(self) -> Tensor | float:
        """Zero that depends on every parameter of the term."""
        zeros = [
            0.0 * one.sum() for one in self.parameters() if one.requires_grad
        ]
        return sum(zeros, 0.0)


def build_term(config: Mapping, role: str) -> Term:
    """Build a summand.

    Args:
        config: Its dict, with ``type``.
        role: Where it stands, for instance ``'the term'``.

    Raises:
        ValueError: If the type is none of a term, or refuses its settings.
    """
    kind = find(config, role)
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise ValueError(
            f'{role} must be a term, got type={config["type"]!r}. A loss is '
            f"named inside of one: dict(type='mmkd.FeatureTerm', teacher=…, "
            f'loss=dict(type=…)).'
        )
    return build(config, role)
