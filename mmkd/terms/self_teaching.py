"""Self: the average of the student's own past weights teaches it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.build import build
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.structures.step import Shower
from mmkd.taps import recording, resolve
from mmkd.teachers import run_detector
from mmkd.terms.group import GroupTerm

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

AVERAGE = dict(type='ExponentialMovingAverage', momentum=0.001)


@MODELS.register_module()
class SelfTerm(GroupTerm):
    r"""Terms whose teacher is a running average of the student.

    .. math:: \theta_T \leftarrow (1 - m) \theta_T + m \theta_S

    once an iteration, before the terms look; the first time the average is
    the student as it is. Give the group a ``schedule`` that begins late, and
    the average begins there: before, a student has nothing to tell itself.

    The average stands under ``terms.`` in a checkpoint, so that a stopped run
    goes on as it was. It is in eval mode, gets no gradient, and is no part of
    the student that is deployed.

    Args:
        terms: Configs of the terms by name; they name ``name`` as teacher.
        name: What the average is called among the teachers.
        average: Config of the average, of MMEngine's and MMDetection's
            registries, for instance ``ExpMomentumEMA``. Buffers, as those of
            BatchNorm, are averaged as well unless it says otherwise.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If a teacher has that name already, or no term names it.

    Reference:
        Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS
        2017, arXiv:1703.01780, for classification; on a detector's features
        and predictions it is our form.
    """

    transparent = False

    def __init__(
        self,
        terms: Mapping[str, Mapping],
        name: str = 'self',
        average: Mapping = AVERAGE,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(terms, schedule)
        self.teacher = name
        self.config = dict(average)
        self.average: nn.Module | None = None
        self._updated: int | None = None

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        if self.teacher in teachers:
            raise ValueError(
                f'SelfTerm cannot call its average {self.teacher!r}: a '
                f'teacher has that name. Set name= to another.'
            )
        model = plain_copy(student)
        view = _Average(self.teacher, model)
        super().bind(student, {**teachers, self.teacher: view})
        if self.teacher not in self.teacher_names:
            raise ValueError(
                f'SelfTerm averages the student, but none of its terms '
                f'learns from it. Write teacher={self.teacher!r} in one.'
            )
        # Its classes are the student's own: nothing has to be compared.
        self.teacher_names.remove(self.teacher)
        self.paths = view.paths
        self.average = build(
            {'update_buffers': True, **self.config},
            'the average of SelfTerm',
            model=model,
        )
        self.average.eval()

    def train(self, mode: bool = True) -> SelfTerm:
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def forward(self, step: Step) -> dict[str, Tensor]:
        if self.training:
            self._follow(step)
        shower = self._shower(step.samples)
        parts = super().forward(
            replace(step, teachers={**step.teachers, self.teacher: shower})
        )
        step._ran.pop(self.teacher, None)  # the name is the group's alone
        return parts

    def _follow(self, step: Step) -> None:
        """Average once an iteration, however often its batch is shown."""
        if self._updated != step.iteration:
            self._updated = step.iteration
            self.average.update_parameters(step.student.detector)

    def _shower(self, samples: list) -> Shower:
        def show(
            images: Tensor, grad: bool = False, shown: list = samples
        ) -> Outputs:
            model = self.average.module
            with (
                torch.set_grad_enabled(grad),
                recording(model, self.paths, stop=True) as record,
            ):
                record.size = tuple(images.shape[-2:])
                run_detector(model, images, shown)
            return record

        return show


class _Average:
    """The average, as terms see a teacher while they are bound.

    It remembers nothing, has the student's classes, and is shown its images.
    """

    memory = shared = names = None
    sham = False

    def __init__(self, name: str, detector: nn.Module) -> None:
        self.name, self.detector = name, detector
        self.paths: list[str] = []

    def tap(self, path: str) -> None:
        resolve(self.detector, path)
        if path not in self.paths:
            self.paths.append(path)


def plain_copy(student: nn.Module) -> nn.Module:
    """A student without its teachers and terms, as its plain config builds it.

    Args:
        student: A detector that the distiller has extended.
    """
    terms = student._modules.pop('terms', None)
    try:
        model = copy.deepcopy(student)
    finally:
        if terms is not None:
            student._modules['terms'] = terms
    model.__class__ = student.student_class
    model._state_dict_pre_hooks.clear()  # the distiller's own
    model.__dict__.pop('teachers')
    return model
