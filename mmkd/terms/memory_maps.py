"""What the encoder of a DETR hands its decoder, as maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import crop, pick_levels
from mmkd.terms.feature import FeatureTerm
from mmkd.terms.queries import ENCODER, check_asks
from mmkd.terms.query_matching import memory_maps

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Where the memory's maps have their sizes from.
MAPS = 'neck'


@MODELS.register_module()
class MemoryTerm(FeatureTerm):
    """Distance between what two encoders hand their decoders.

    The memory of DETR, Conditional and DAB-DETR is one map, the last of the
    neck; that of Deformable DETR, DINO and DDQ is all of them. It is laid out
    as maps, so that every loss, weight and alignment of :class:`FeatureTerm`
    applies.

    Args:
        teacher: Name of the teacher.
        loss: Config of the loss.
        levels: Which maps of the memory, 0 is the finest; all if None.
        align: Config of the neck that makes the student's maps comparable;
            none if None.
        teacher_levels: The same as ``levels`` for the teacher; as the
            student's if None.
        teacher_align: The same as ``align`` for the teacher's maps.
        weight: Config of what says how much each cell counts, of
            ``mmkd.weights``.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a detector has no queries, or levels, channels or sizes
            do not fit, while the model is built.

    Not kept:
        border: What cells of the padded border count, says the loss.

    Reference:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV
        2020, arXiv:2005.12872, of the encoder; what to compare is ours.
    """

    def __init__(
        self,
        teacher: str,
        loss: Mapping,
        levels: int | Sequence[int] | None = None,
        align: Mapping | None = None,
        teacher_levels: int | Sequence[int] | None = None,
        teacher_align: Mapping | None = None,
        weight: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(
            teacher,
            loss,
            tap=(ENCODER, MAPS),
            levels=levels,
            align=align,
            teacher_levels=teacher_levels,
            teacher_align=teacher_align,
            weight=weight,
            schedule=schedule,
        )

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        who = type(self).__name__
        check_asks(who, student, 'student')
        if self.teacher in teachers:
            check_asks(who, teachers[self.teacher].detector, 'teacher')
        super().bind(student, teachers)

    def maps(
        self, step: Step
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The memories of both sides as maps, paired, before any alignment.

        Raises:
            ValueError: If one side has more of them and the loss pairs them
                level by level.
        """
        shown = step.teacher(self.teacher)
        student, teacher = (
            pick_levels(memory_maps(outputs), levels, 'The memory')
            for outputs, levels in (
                (step.student, self.levels),
                (shown, self.teacher_levels),
            )
        )
        if len(student) != len(teacher) and not self.joint:
            raise ValueError(
                f"The student's memory has {len(student)} maps, that of "
                f'teacher {self.teacher!r} {len(teacher)}. Pair levels of one '
                f'stride with levels= and teacher_levels=.'
            )
        teacher = tuple(one.detach() for one in teacher)
        return student, crop(teacher, shown.size, step.images.shape[-2:])
