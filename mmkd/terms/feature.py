"""Feature maps of the student, made comparable with a teacher's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from mmkd.build import build, find
from mmkd.checks import check_name, check_names, check_once
from mmkd.classes import class_channels
from mmkd.ops.masks import equal_weight
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Outputs, Step
from mmkd.structures.constants import constant
from mmkd.taps import crop, maps_of, pick_levels, resolve
from mmkd.terms.classifier import classifier_weight, readers
from mmkd.terms.queries import HEAD, asks
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class FeatureTerm(Term):
    """Distance between maps of the student and maps of a teacher.

    .. math:: \\sum_l loss_l(align(student[tap])_l, teacher[tap]_l; weight_l)

    A loss of ``scope = 'level'`` is built once a level, each with its own
    weights, and summed; one of ``scope = 'levels'`` is built once and gets all
    levels as tuples. One that asks for the teacher's classifier is shown its
    weights in the first step.

    Of a teacher that lacks classes of the student, class scores of dense heads
    (``tap='bbox_head', output=0``) are compared for the others alone: the
    student's channels are picked, with the background's of a softmax, and
    boxes of a class that is left out have the label -1.

    Args:
        teacher: Name of the teacher.
        loss: Config of the loss.
        tap: Submodule whose output is compared: ``'neck'``, ``'backbone'``,
            ``'bbox_head'``, or any path below; of several, their maps one
            after the other.
        levels: Which maps of that output, 0 is the finest; all if None.
        output: Which of a head's outputs, for instance 0 for class scores.
        align: Config of the neck that makes the student's maps comparable;
            none if None. It is built with ``num_levels``.
        teacher_tap, teacher_levels, teacher_output: The same for the
            teacher; as the student's if None.
        teacher_align: The same for the teacher's maps. It gets no gradient
            through them, but its own weights learn.
        weight: Config of what says how much each cell counts, of
            ``mmkd.weights``; the loss gets its maps as a fourth argument. The
            loss's own rule if None.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If taps, levels, channels or sizes do not fit, while the
            model is built.
    """

    def __init__(
        self,
        teacher: str,
        loss: Mapping,
        tap: str | Sequence[str] = 'neck',
        levels: int | Sequence[int] | None = None,
        output: int | None = None,
        align: Mapping | None = None,
        teacher_tap: str | Sequence[str] | None = None,
        teacher_levels: int | Sequence[int] | None = None,
        teacher_output: int | None = None,
        teacher_align: Mapping | None = None,
        weight: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        self.teacher = teacher
        self.taps = _paths('tap', tap)
        self.teacher_taps = (
            self.taps
            if teacher_tap is None
            else _paths('teacher_tap', teacher_tap)
        )
        self.levels = _indices('levels', levels)
        self.teacher_levels = (
            self.levels
            if teacher_levels is None
            else _indices('teacher_levels', teacher_levels)
        )
        self.output = _output('output', output)
        self.teacher_output = (
            output
            if teacher_output is None
            else _output('teacher_output', teacher_output)
        )
        count = None if self.levels is None else len(self.levels)
        self.align = _build_align(align, 'align', count)
        theirs = self.teacher_levels
        self.teacher_align = _build_align(
            teacher_align,
            'teacher_align',
            count if theirs is None else len(theirs),
        )
        self.losses = _build_losses(loss, self.levels)
        self.weight = _build_weight(weight, self.losses[0])
        self._introduced = False
        #: Each level's share of the last step, for who looks whether it is a
        #: number.
        self.by_level: dict[int, Tensor] = {}
        #: Of dense heads, those of the student's scores that are compared.
        self._scores: Scores | None = None
        if not self.joint:
            _check_pairing(self.levels, self.teacher_levels)

    @property
    def joint(self) -> bool:
        """Whether the loss sees all levels at once."""
        return getattr(self.losses[0], 'scope', 'level') == 'levels'

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        for path in self.taps:
            _refuse_queries(student, path, 'student')
            self.tap(student, path)
        for path in self.teacher_taps:
            detector = teachers[self.teacher].detector
            _refuse_queries(detector, path, 'teacher')
            teachers[self.teacher].tap(path)
        self.teacher_names = [self.teacher]
        self._scores = self._dense(student, teachers[self.teacher])
        for loss in readers(self.losses):
            classifier_weight(
                type(loss).__name__, teachers[self.teacher].detector
            )  # raises if there is none
        if self.weight is not None:
            self.weight.bind(self, student, teachers[self.teacher])

    def _dense(self, student: nn.Module, teacher: Teacher) -> Scores | None:
        """Whose scores are compared, if they are dense heads of both."""
        heads = [
            resolve(detector, path)
            for detector, paths in (
                (student, self.taps),
                (teacher.detector, self.teacher_taps),
            )
            for path in paths
        ]
        dense = all(
            name == 'forward'
            and hasattr(head, 'prior_generator')
            and hasattr(head, 'cls_out_channels')
            for head, name in heads
        )
        if not dense or {self.output, self.teacher_output} != {0}:
            return None
        head = heads[0][0]
        return Scores(head.cls_out_channels, head.num_classes, teacher.shared)

    def silent(self) -> bool:
        return all(
            getattr(loss, 'loss_weight', None) == 0 for loss in self.losses
        )

    def compares_classes(self) -> bool:
        # Proposals are objects of whatever class.
        return all(
            any(
                'head' in path and path.split('.')[0] != 'rpn_head'
                for path in paths
            )
            for paths in (self.taps, self.teacher_taps)
        ) or (self.weight is not None and self.weight.needs_classes)

    def takes_some_classes(self) -> bool:
        weighs = self.weight is not None and self.weight.needs_classes
        return self._scores is not None and not weighs

    def checkable(self, step: Step) -> bool:
        """Whether a dry pass recorded all; its maps are compared if not all
        that the weight reads was there.

        Raises:
            ValueError: If they do not fit the loss.
        """
        if super().checkable(step):
            return True
        if all(step.student.has(path) for path in self.taps):
            student, teacher = self._aligned(step)
            weights = tuple(equal_weight(step.gt, one) for one in student)
            self._compare(step, student, teacher, weights)
        return False

    def forward(self, step: Step) -> Tensor | dict[str, Tensor]:
        student, teacher = self._aligned(step)
        weights = None if self.weight is None else self._weights(step, student)
        return self._compare(step, student, teacher, weights)

    def _aligned(
        self, step: Step
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        student, teacher = self.maps(step)
        if self.align is not None:
            student = self.align(student, teacher)
        if self.teacher_align is not None:
            teacher = self.teacher_align(teacher, student)
        return student, teacher

    def _compare(
        self,
        step: Step,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        weights: Sequence[Tensor] | None,
    ) -> Tensor | dict[str, Tensor]:
        self._introduce(step)
        gt = step.gt if self._scores is None else self._scores.labels(step.gt)
        if self.joint:
            more = () if weights is None else (weights,)
            return self.losses[0](student, teacher, gt, *more)
        more = [()] * len(student) if weights is None else zip(weights)
        losses = [
            self._level_loss(level)(one, other, gt, *extra)
            for level, (one, other, extra) in enumerate(
                zip(student, teacher, more)
            )
        ]
        if not step.dry:
            numbers = self.levels or range(len(losses))
            self.by_level = {
                number: _whole(one).detach()
                for number, one in zip(numbers, losses)
            }
        return _sum(losses)

    def _introduce(self, step: Step) -> None:
        """Show the teacher's classifier to losses that ask for it, once."""
        if self._introduced:
            return
        for loss in readers(self.losses):
            detector = step.teacher(self.teacher).detector
            weight = classifier_weight(type(loss).__name__, detector)
            loss.read_classifier(weight)
            # It is not loaded before the training starts.
            self._introduced = not step.dry

    def _weights(
        self, step: Step, maps: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """How much each cell of the maps counts, (N, 1 or A, H, W) each."""
        weights = tuple(self.weight(step))
        if self.levels is not None:
            weights = tuple(weights[level] for level in self.levels)
        sizes, wanted = (
            [(len(one), *one.shape[-2:]) for one in group]
            for group in (weights, maps)
        )
        if sizes != wanted:
            raise ValueError(
                f'{type(self.weight).__name__} weighs maps of (images, rows, '
                f'columns) {sizes}, the term compares maps of {wanted}. Tap '
                f'levels of the same strides.'
            )
        return weights

    def maps(
        self, step: Step
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The maps of both sides, paired, before any alignment.

        Raises:
            ValueError: If one side has more of them and the loss pairs them
                level by level.
        """
        student = _pick(step.student, self.taps, self.output, self.levels)
        if self._scores is not None:
            student = self._scores.pick(student)
        shown = step.teacher(self.teacher)
        teacher = _pick(
            shown, self.teacher_taps, self.teacher_output, self.teacher_levels
        )
        if len(student) != len(teacher) and not self.joint:
            raise ValueError(
                f'The student has {len(student)} maps at '
                f'{_list(self.taps)}, teacher {self.teacher!r} has '
                f'{len(teacher)} at {_list(self.teacher_taps)}. Pair levels '
                f'of one stride with levels= and teacher_levels=.'
            )
        teacher = tuple(one.detach() for one in teacher)
        return student, crop(teacher, shown.size, step.images.shape[-2:])

    def _level_loss(self, level: int) -> Callable:
        return self.losses[min(level, len(self.losses) - 1)]


class Scores(NamedTuple):
    """What a dense head says of classes.

    Attributes:
        width: Scores of an anchor, with the background's.
        classes: Its classes.
        shared: Those that are compared; all if None.
    """

    width: int
    classes: int
    shared: tuple[int, ...] | None

    def pick(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of maps (N, A · C, H, W) the scores that are compared."""
        if self.shared is None:
            return tuple(maps)
        picked = []
        for one in maps:
            channels = class_channels(
                one.shape[1], self.width, self.classes, self.shared
            )
            index = constant(channels, one, torch.long)
            picked.append(one.index_select(1, index))
        return tuple(picked)

    def labels(self, gt: GroundTruth) -> GroundTruth:
        """Annotations by the classes that are compared."""
        return gt if self.shared is None else gt.of_classes(self.shared)


def _refuse_queries(detector: nn.Module, path: str, side: str) -> None:
    if path.split('.')[0] == HEAD and asks(detector):
        raise ValueError(
            f'The {side}, {type(detector).__name__}, answers query by query '
            f'at {path!r}, and query i of one detector has nothing in common '
            f'with query i of another. Choose a term that pairs queries, for '
            f'instance mmkd.QueryFeatureTerm, or tap the neck.'
        )


def _paths(name: str, tap: str | Sequence[str]) -> tuple[str, ...]:
    paths = check_names('FeatureTerm', name, tap)
    if not paths:
        raise ValueError(
            f'FeatureTerm has nothing to compare with {name}={tap!r}. Write '
            f"for instance {name}='neck'."
        )
    return paths


def _output(name: str, output: int | None) -> int | None:
    if output is not None and (type(output) is not int or output < 0):
        raise ValueError(
            f"{name} is the position of one of a head's outputs, 0 for the "
            f'first; got {name}={output!r}. Write for instance {name}=0.'
        )
    return output


def _list(paths: Sequence[str]) -> str:
    return ', '.join(repr(path) for path in paths)


def _pick(
    outputs: Outputs,
    paths: Sequence[str],
    output: int | None,
    levels: tuple[int, ...] | None,
) -> tuple[Tensor, ...]:
    maps = tuple(
        one
        for path in paths
        for one in maps_of(outputs.at(path), f'The tap {path!r}', output)
    )
    return pick_levels(maps, levels, _list(paths))


def _indices(
    name: str, levels: int | Sequence[int] | None
) -> tuple[int, ...] | None:
    if levels is None:
        return None
    found = (levels,) if isinstance(levels, int) else levels
    if (
        not isinstance(found, Sequence)
        or not found
        or any(type(level) is not int or level < 0 for level in found)
    ):
        raise ValueError(
            f'{name} are positions in the pyramid, 0 is the finest; got '
            f'{levels!r}. Write for instance {name}=(0, 1, 2).'
        )
    if name == 'levels':  # one level of a teacher may teach several
        check_once('FeatureTerm', name, found)
    return tuple(found)


def _check_pairing(
    levels: tuple[int, ...] | None, teacher_levels: tuple[int, ...] | None
) -> None:
    if teacher_levels is None or levels is None:
        return
    if len(levels) != len(teacher_levels):
        raise ValueError(
            f'levels={levels} and teacher_levels={teacher_levels} must pair '
            f'one to one; got {len(levels)} and {len(teacher_levels)}.'
        )


def _build_align(
    config: Mapping | None, role: str, count: int | None
) -> nn.Module | None:
    if config is None:
        return None
    return build(config, role, num_levels=count)


def _build_losses(
    config: Mapping, levels: tuple[int, ...] | None
) -> nn.ModuleList:
    kind = find(config, 'loss')
    knows_level = 'level_index' in inspect.signature(kind).parameters
    if levels is None and knows_level:
        raise ValueError(_levels_wanted(kind))
    if getattr(kind, 'scope', 'level') == 'levels':
        return nn.ModuleList([build(config, 'loss')])
    if levels is None:
        loss = build(config, 'loss')
        if any(True for _ in loss.parameters()):
            raise ValueError(_levels_wanted(kind))
        return nn.ModuleList([loss])
    return nn.ModuleList(
        build(
            config, 'loss', **({'level_index': level} if knows_level else {})
        )
        for level in levels
    )


def _build_weight(config: Mapping | None, loss: nn.Module) -> nn.Module | None:
    if config is None:
        return None
    if 'weight' not in inspect.signature(loss.forward).parameters:
        raise ValueError(
            f'{type(loss).__name__} says itself how much each cell counts; it '
            f'takes no weight=. Leave weight out, or use a loss that does, '
            f'for instance mmkd.WeightedMSELoss.'
        )
    return build(config, 'weight')


def _levels_wanted(kind: type) -> str:
    return (
        f'{kind.__name__} differs from level to level, so the term must know '
        f'how many there are: add for instance levels=(0, 1, 2, 3, 4) to it.'
    )


def _whole(loss: Tensor | dict[str, Tensor]) -> Tensor:
    if not isinstance(loss, dict):
        return loss
    return sum(
        value for part, value in loss.items() if not part.startswith('watch_')
    )


def _sum(
    losses: Sequence[Tensor | dict[str, Tensor]],
) -> Tensor | dict[str, Tensor]:
    total: Tensor | dict[str, Tensor] | None = None
    for loss in losses:
        if total is None:
            total = loss
        elif isinstance(loss, dict):
            total = {part: total[part] + loss[part] for part in loss}
        else:
            total = total + loss
    return total
