"""Residual: the assistant learns what the student's maps leave undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmkd.checks import suggest
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of, pick_levels
from mmkd.terms.feature import FeatureTerm

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class ResidualTerm(FeatureTerm):
    r"""Distance of the assistant's maps to what is left of the teacher's.

    .. math:: L_A = \sum_l \frac{1}{N C H W}
              \| (T_l - sg(F_{S,l})) - F_{A,l} \|^2

    It is computed as the distance of the sum :math:`sg(F_S) + F_A`, which is
    what is deployed, to T: the same for every loss of a difference, and
    defined for others. The student gets no gradient (sg); it has a term of its
    own,
    :math:`L_S = \| T - F_S \|^2`::

        main = dict(
            type='mmkd.FeatureTerm',
            teacher='r101',
            tap='backbone.main',
            teacher_tap='backbone',
            loss=dict(type='mmkd.MimicLoss'),
        )
        residual = dict(type='mmkd.ResidualTerm', teacher='r101')

    Both at once train the two jointly. Progressively, phases let the student
    learn first, ``train='backbone.main', terms='main'``, and then the
    assistant, ``train='backbone.assistant', terms='residual'``.

    Args:
        teacher: Name of the teacher.
        loss: Config of the loss; :class:`mmkd.losses.mimic.MimicLoss` of
            weight 1 if None.
        tap: A :class:`mmkd.backbones.assisted.ResidualBackbone`, or another
            part with ``main`` and ``assistant``.
        levels: Which maps, 0 is the finest; all if None.
        teacher_tap: Where the teacher's maps are: ``'backbone'``, or
            ``'neck'`` if the branches have necks.
        teacher_levels: As ``levels`` if None.
        weight: Config of what says how much each cell counts, of
            ``mmkd.weights``, with a loss that takes it; all alike if None.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If there is no student and assistant at the tap, or their
            maps are not of the teacher's form.

    Reference:
        Gao et al., "Residual Knowledge Distillation", 2020, arXiv:2002.09168.
        The form of the two losses is our reading of it.
    """

    def __init__(
        self,
        teacher: str,
        loss: Mapping | None = None,
        tap: str = 'backbone',
        levels: int | Sequence[int] | None = None,
        teacher_tap: str = 'backbone',
        teacher_levels: int | Sequence[int] | None = None,
        weight: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(
            teacher,
            loss or dict(type='mmkd.MimicLoss'),
            tap=f'{tap}.assistant',
            levels=levels,
            teacher_tap=teacher_tap,
            teacher_levels=teacher_levels,
            weight=weight,
            schedule=schedule,
        )
        self.main = f'{tap}.main'

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        modules = dict(student.named_modules())
        for path in (self.main, *self.taps):
            if path not in modules:
                raise ValueError(
                    f'ResidualTerm needs a student and an assistant, but '
                    f'{type(student).__name__} has no {path!r}. Set '
                    f"backbone=dict(type='mmkd.ResidualBackbone', main=…, "
                    f'assistant=…) in model, or tap= to where it is. '
                    f'{suggest(path, modules)}'
                )
        super().bind(student, teachers)
        self.tap(student, self.main)

    def maps(
        self, step: Step
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        rest, teacher = super().maps(step)
        main = pick_levels(
            maps_of(step.student.at(self.main), f'The tap {self.main!r}'),
            self.levels,
            repr(self.main),
        )
        return (
            tuple(one.detach() + other for one, other in zip(main, rest)),
            teacher,
        )
