"""Assistant: a head of the teacher's kind on the student's features."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config
from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_name
from mmkd.configs import read_config, student_config
from mmkd.registry import DETECTORS, MODELS
from mmkd.structures import Step
from mmkd.taps import maps_of, pick_levels, recording
from mmkd.teachers import fed, run_detector, without_init
from mmkd.terms.group import GroupTerm

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class AssistantTerm(GroupTerm):
    r"""The student's features learn through a head like the teacher's, too.

    .. math:: L = \lambda L_{det}(A(f_S), y) + \sum_k L_k(A(f_S), T)

    A is the assistant: the heads of a detector of the teacher's kind, trained
    with the student on the same labels y, and compared with the teacher by
    terms between heads of one kind. What a two-stage teacher knows reaches a
    one-stage student, whose own head has nothing of the sort, through the
    features f_S that both share. The assistant stands under ``terms.`` and is
    no part of the student that is deployed.

    The paths of the terms' student side are those of the assistant:
    ``'bbox_head'``, ``'rpn_head'``, ``'roi_head.bbox_head'``.

    Args:
        terms: Configs of the terms by name. None leaves the assistant alone
            with the labels, which needs no teacher.
        teacher: Name of the teacher whose kind it is.
        config: Config of another detector whose heads it takes, as a teacher
            names one; the teacher's if None.
        tap: Maps of the student that its heads see.
        levels: Which of them, 0 is the finest; all if None.
        align: Config of the neck that brings them to what its heads expect;
            none if None.
        loss_weight: Factor of its detection loss.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If neither a teacher nor a config is named, or the maps do
            not suit the heads, while the model is built.

    Reference:
        Wang et al., "HEAD: HEtero-Assists Distillation for Heterogeneous
        Object Detectors", ECCV 2022, arXiv:2207.05345; without terms their
        teacher-free form. Read: the abstract. Which terms join assistant and
        teacher is left to the config.
    """

    transparent = False
    needs_terms = False

    def __init__(
        self,
        terms: Mapping[str, Mapping] | None = None,
        teacher: str | None = None,
        config: str | Path | Mapping | Config | None = None,
        tap: str = 'neck',
        levels: Sequence[int] | None = None,
        align: Mapping | None = None,
        loss_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(terms, schedule)
        if teacher is None and config is None:
            raise ValueError(
                'AssistantTerm needs heads: name teacher=…, whose kind they '
                'are, or config=… of a detector that has them.'
            )
        self.teacher, self.tapped, self.levels = teacher, tap, levels
        self.loss_weight = loss_weight
        self.align = None if align is None else build(align, 'align')
        self.heads: nn.Module | None = None
        if config is not None:
            model = read_config(config, 'AssistantTerm').model
            self.heads = _headed(
                DETECTORS.build(without_init(student_config(model)))
            )

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        if self.heads is None:
            check_name('The distiller', 'teacher', self.teacher, teachers)
            self.heads = _headed(
                copy.deepcopy(teachers[self.teacher].detector)
            )
        self.tap(student, self.tapped)
        self.bind_terms(self.heads, teachers)

    def silent(self) -> bool:
        return not self.loss_weight and super().silent()

    def checkable(self, step: Step) -> bool:
        return step.student.has(self.tapped)

    def forward(self, step: Step) -> dict[str, Tensor]:
        factors = self.factors(step)
        maps = self._maps(step)
        paths = [
            path for term in self.terms.values() for path in term.student_paths
        ]
        parts: dict[str, Tensor] = {}
        with (
            fed(self.heads, maps),
            recording(self.heads, paths) as record,
        ):
            if not step.dry:
                own = self.heads.loss(step.images, step.samples)
                parts.update(self._own(own))
            else:  # a look at shapes while the model is built
                run_detector(self.heads, step.images, step.samples)
        step = replace(step, student=record)
        if step.dry:
            for name, term in self.terms.items():
                factors[name] *= term.checkable(step)
        return {**parts, **self.said(step, factors)}

    def _maps(self, step: Step) -> tuple[Tensor, ...]:
        who = f'The tap {self.tapped!r}'
        maps = maps_of(step.student.at(self.tapped), who)
        maps = pick_levels(maps, self.levels, who)
        if self.align is not None:
            maps = self.align(maps)
        self._check_channels(who, maps)
        return maps

    def _check_channels(self, who: str, maps: Sequence[Tensor]) -> None:
        found = [one.shape[1] for one in maps]
        for name in ('rpn_head', 'bbox_head'):
            wanted = getattr(
                getattr(self.heads, name, None), 'in_channels', None
            )
            if isinstance(wanted, int) and set(found) != {wanted}:
                raise ValueError(
                    f"{who} has {found} channels, AssistantTerm's {name} "
                    f"reads {wanted}. Set align=dict(type='mmkd.ConvAdapt', "
                    f'in_channels={found}, out_channels={wanted}, '
                    f'num_levels={len(found)}).'
                )

    def _own(self, losses: Mapping[str, Any]) -> dict[str, Tensor]:
        """The assistant's detection losses as parts."""
        parts = {}
        for name, loss in losses.items():
            values = loss if isinstance(loss, (list, tuple)) else [loss]
            total = sum(value.mean() for value in values)
            if 'loss' in name:
                parts[f'own_{name}'] = self.loss_weight * total
            else:
                parts[f'watch_own_{name}'] = total
        return parts


def _headed(detector: nn.Module) -> nn.Module:
    """A detector without backbone and neck, with new weights, to be trained.

    Its data preprocessor goes as well: it sees maps.
    """
    for part in ('backbone', 'neck', 'data_preprocessor'):
        detector._modules.pop(part, None)
    if not any(True for _ in detector.parameters()):
        raise ValueError(
            f'AssistantTerm takes the heads of a detector, '
            f'{type(detector).__name__} has none that can be trained.'
        )
    detector.requires_grad_(True)
    detector.init_weights()
    return detector
