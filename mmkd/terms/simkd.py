"""SimKD: the student's maps become those that the teacher's head reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmkd.checks import suggest
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.terms.feature import FeatureTerm

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Towers of a dense head: of classes and of boxes.
TOWERS = ('cls_convs', 'reg_convs')
#: What turns a head's outputs into boxes, and is no module.
GEOMETRY = ('prior_generator', 'bbox_coder')


@MODELS.register_module()
class SimKDTerm(FeatureTerm):
    r"""Squared distance of the maps that a reused, frozen head reads.

    .. math:: L = \sum_l \frac{1}{N C H W} \| P(F_l) - T_l \|^2

    The student detects by the *teacher's* head: it is part of the student's
    own config and checkpoint, takes over the teacher's weights (``inherit`` of
    the teacher) and keeps them (a phase that trains only what stands before
    it). No label is needed. P is
    :class:`mmkd.necks.projector.SimKDProjector`, the last of the student's
    necks, and is deployed as well::

        neck=[dict(type='FPN', …), dict(type='mmkd.SimKDProjector', …)]
        teachers=dict(r101=dict(…, inherit='bbox_head'))
        terms=dict(simkd=dict(type='mmkd.SimKDTerm', teacher='r101'))
        phases=[dict(train=('backbone', 'neck'), supervised=False)]

    That the head is the teacher's is checked: while the model is built, that
    both are of one kind, channels, priors, box coding and classes, and that it
    is inherited; in each step, that nothing of it can be trained.

    A two-stage detector reuses ``('rpn_head', 'roi_head')``; a DETR
    ``('decoder', 'query_embedding', 'bbox_head')`` behind ``tap='encoder'``,
    where the student's own encoder takes the place of P and is trained as
    well. With labels, leave ``supervised=False`` out; ``loss_weight`` then
    says how much the maps count against them (published: no labels).

    Args:
        teacher: Name of the teacher.
        reuse: Parts of the student that are the teacher's.
        reuse_from: Of a dense head, the first convolution of its towers that
            is the teacher's. Those before it are the student's own and
            project: their outputs are compared instead of the neck's. The
            message of a config that inherits something else names the parts;
            the phase trains ``'bbox_head.cls_convs.0'``, … as well.
        loss: Config of the loss; :class:`mmkd.losses.mimic.MimicLoss` of
            weight 1 if None.
        tap: Where the maps are that the reused part reads.
        levels: Which maps are compared; all if None, as ``reuse_from`` needs.
        weight: Config of what says how much each cell counts, of
            ``mmkd.weights``, with a loss that takes it
            (``mmkd.WeightedMSELoss``); all alike if None.
        schedule: Factor over the training; constant 1 if None.

    Raises:
        ValueError: If the parts are not the teacher's, or maps do not fit.

    Reference:
        Chen et al., "Knowledge Distillation with the Reused Teacher
        Classifier", CVPR 2022, arXiv:2203.14001, on image classifiers. Maps
        of each level for their one feature, ``weight``, the towers of
        ``reuse_from`` and the encoder's memory are ours.
    """

    def __init__(
        self,
        teacher: str,
        reuse: str | Sequence[str] = 'bbox_head',
        reuse_from: int = 0,
        loss: Mapping | None = None,
        tap: str = 'neck',
        levels: Sequence[int] | None = None,
        weight: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        self.reuse = (reuse,) if isinstance(reuse, str) else tuple(reuse)
        self.reuse_from = reuse_from
        _check_reuse(self.reuse, reuse_from, levels)
        super().__init__(
            teacher,
            loss or dict(type='mmkd.MimicLoss'),
            tap=_towers(self.reuse[0], reuse_from - 1) if reuse_from else tap,
            levels=levels,
            weight=weight,
            schedule=schedule,
        )
        self.parts: tuple[str, ...] = ()

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        if self.teacher in teachers:
            one = teachers[self.teacher]
            for path in self.reuse:
                _check_same_kind(path, student, one, self.reuse_from)
            self.parts = tuple(_parts(student, self.reuse, self.reuse_from))
            _check_inherited(self.parts, one)
        super().bind(student, teachers)

    def compares_classes(self) -> bool:
        # Proposals are objects of whatever class.
        return any(path != 'rpn_head' for path in self.reuse)

    def forward(self, step: Step) -> Tensor | dict[str, Tensor]:
        if not step.dry:
            self._check_rests(step.student.detector)
        return super().forward(step)

    def _check_rests(self, student: nn.Module) -> None:
        for part in self.parts:
            for name, one in student.get_submodule(part).named_parameters():
                if one.requires_grad:
                    raise ValueError(
                        f'SimKDTerm reuses the head of teacher '
                        f'{self.teacher!r} as it is, but {part}.{name} of the '
                        f'student is trained. Train only what stands before '
                        f"it: add phases=[dict(train=('backbone', 'neck'), "
                        f'supervised=False)] to model.'
                    )

    def _weights(
        self, step: Step, maps: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        # The maps of one tower after those of the other.
        count = len(self.taps)
        return super()._weights(step, maps[: len(maps) // count]) * count

    def maps(
        self, step: Step
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        student, teacher = super().maps(step)
        for one, other in zip(student, teacher):
            if one.shape[-2:] != other.shape[-2:]:
                raise ValueError(
                    f'SimKDTerm needs maps of the sizes that the head of '
                    f'teacher {self.teacher!r} reads, {_size(other)}, got '
                    f'{_size(one)}. Set pool= in mmkd.SimKDProjector where '
                    f"the student's are finer, or give the student a neck of "
                    f"the teacher's strides."
                )
            if one.shape[1] != other.shape[1]:
                raise ValueError(
                    f'SimKDTerm needs maps of the {other.shape[1]} channels '
                    f'that the head of teacher {self.teacher!r} reads, got '
                    f'{one.shape[1]}. Set out_channels={other.shape[1]} in '
                    f'mmkd.SimKDProjector, the last of the necks.'
                )
        return student, teacher


def _check_reuse(
    reuse: tuple[str, ...], reuse_from: int, levels: Sequence[int] | None
) -> None:
    if not reuse:
        raise ValueError(
            'SimKDTerm reuses at least one part, got reuse=(). Set '
            "reuse='bbox_head', or reuse=('rpn_head', 'roi_head')."
        )
    if reuse_from < 0 or (reuse_from and len(reuse) > 1):
        raise ValueError(
            f'SimKDTerm takes reuse_from, the number of a convolution, with '
            f'one dense head, got reuse_from={reuse_from} and reuse={reuse}. '
            f'Set reuse_from=0 to reuse all.'
        )
    if reuse_from and levels is not None:
        raise ValueError(
            f'SimKDTerm with reuse_from={reuse_from} compares the maps of '
            f'both towers at all levels, got levels={levels}. Leave levels '
            f'out, or set reuse_from=0.'
        )


def _towers(head: str, conv: int) -> tuple[str, ...]:
    return tuple(f'{head}.{tower}.{conv}' for tower in TOWERS)


def _parts(
    student: nn.Module, reuse: tuple[str, ...], reuse_from: int
) -> Iterator[str]:
    """Paths of what is the teacher's."""
    if not reuse_from:
        yield from reuse
        return
    (head,) = reuse
    for name, child in student.get_submodule(head).named_children():
        if name in TOWERS:
            for conv in range(reuse_from, len(child)):
                yield f'{head}.{name}.{conv}'
        elif child.state_dict():
            yield f'{head}.{name}'


def _check_same_kind(
    path: str, student: nn.Module, teacher: Teacher, reuse_from: int
) -> None:
    own, theirs = (
        _submodule(path, one, whose)
        for one, whose in (
            (student, f'the student, {type(student).__name__},'),
            (teacher.detector, f'teacher {teacher.name!r}'),
        )
    )
    if reuse_from:
        _check_towers(path, own, reuse_from)
    spared = [
        f'{tower}.{conv}.'
        for tower, conv in product(TOWERS, range(reuse_from))
    ]
    own, theirs = (
        {
            key: value
            for key, value in _settings(one).items()
            if not f'{key}.'.startswith(tuple(spared))
        }
        for one in (own, theirs)
    )
    for key in {**own, **theirs}:
        if own.get(key) != theirs.get(key):
            raise ValueError(
                f'SimKDTerm reuses {path} of teacher {teacher.name!r}, which '
                f"must be of one kind with the student's, but {path}.{key} "
                f'is {theirs.get(key, "absent")} there and '
                f"{own.get(key, 'absent')} here. Take the teacher's config "
                f'of {path} for the student.'
            )


def _submodule(path: str, detector: nn.Module, whose: str) -> nn.Module:
    modules = dict(detector.named_modules())
    if path not in modules:
        heads = [name for name, _ in detector.named_children()]
        raise ValueError(
            f'SimKDTerm reuses {path!r}, but {whose} has no such part. Set '
            f'reuse= to heads that both have. {suggest(path, heads)}'
        )
    return modules[path]


def _check_towers(path: str, head: nn.Module, reuse_from: int) -> None:
    for tower in TOWERS:
        convs = getattr(head, tower, None)
        if not isinstance(convs, nn.ModuleList):
            raise ValueError(
                f'SimKDTerm cannot reuse {path} from convolution '
                f'{reuse_from} on: {type(head).__name__} has no tower '
                f'{tower!r}. Set reuse_from=0 to reuse all of it.'
            )
        if reuse_from > len(convs):
            raise ValueError(
                f'SimKDTerm cannot reuse {path} from convolution '
                f'{reuse_from} on: its towers have {len(convs)}. Set '
                f'reuse_from to at most {len(convs)}, which reuses what '
                f'stands behind them.'
            )


def _settings(part: nn.Module) -> dict[str, Any]:
    """Kinds and settings of a part, by dotted name.

    Losses are left out, and what is no plain value: they do not detect. Shapes
    are compared where weights are inherited.
    """
    found: dict[str, Any] = {}
    for path, module in part.named_modules():
        if any(name.startswith('loss') for name in path.split('.')):
            continue
        place = f'{path}.' if path else ''
        found[f'{place}type'] = type(module).__name__
        owners = [('', module)] + [
            (f'{name}.', getattr(module, name))
            for name in GEOMETRY
            if hasattr(module, name)
        ]
        for inner, owner in owners:
            for name, value in vars(owner).items():
                if _tells(name) and _plain(value):
                    found[f'{place}{inner}{name}'] = value
            if inner:
                found[f'{place}{inner}type'] = type(owner).__name__
    return found


def _tells(name: str) -> bool:
    return not name.startswith(('_', 'loss')) and name != 'training'


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _check_inherited(parts: Sequence[str], teacher: Teacher) -> None:
    given = teacher.inherit
    if given is True:
        return
    given = (given,) if isinstance(given, str) else tuple(given or ())
    for part in parts:
        if any(f'{part}.'.startswith(f'{one}.') for one in given):
            continue
        wanted = parts[0] if len(parts) == 1 else tuple(parts)
        raise ValueError(
            f'SimKDTerm reuses {part} of teacher {teacher.name!r}, but the '
            f'student starts with weights of its own there. Add '
            f'inherit={wanted!r} to this teacher.'
        )


def _size(feature: Tensor) -> str:
    return f'{feature.shape[-2]} x {feature.shape[-1]}'
