"""MHKD: heads at several depths, compared by what they detect."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmdet.models.utils import unpack_gt_instances
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmkd.build import build, find
from mmkd.checks import (
    check_channels,
    check_fraction,
    check_name,
    check_positive,
)
from mmkd.classes import check_num_classes
from mmkd.losses.ld import edge_divergence
from mmkd.losses.soft_target import soft_target_loss
from mmkd.ops.boxes import giou_error
from mmkd.ops.numeric import as_float, zero_of
from mmkd.ops.scores import top_score, valid_samples
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Outputs, Step
from mmkd.structures.ground_truth import labelled
from mmkd.structures.nested import pick
from mmkd.taps import crop, maps_of, pick_levels, resolve
from mmkd.terms.balanced import detection_loss
from mmkd.terms.decoding import (
    check_decodable,
    check_same_anchors,
    decode,
)
from mmkd.terms.prepared import PreparedTerm, learns

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: An auxiliary head: two convolutions a tower, one anchor a cell, and ATSS's
#: assignment, by which every head has objects of all sizes.
HEAD = dict(
    type='ATSSHead',
    stacked_convs=2,
    anchor_generator=dict(
        type='AnchorGenerator',
        ratios=[1.0],
        octave_base_scale=8,
        scales_per_octave=1,
    ),
    bbox_coder=dict(
        type='DeltaXYWHBBoxCoder',
        target_means=[0.0, 0.0, 0.0, 0.0],
        target_stds=[0.1, 0.1, 0.2, 0.2],
    ),
    loss_cls=dict(type='FocalLoss', use_sigmoid=True),
    loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    train_cfg=dict(
        assigner=dict(type='ATSSAssigner', topk=9),
        allowed_border=-1,
        pos_weight=-1,
    ),
)
#: Least sum of weights.
EPS = 1e-6


@MODELS.register_module()
class MultiHeadTerm(PreparedTerm):
    r"""Detections of auxiliary heads at several depths, and of the last ones.

    A small dense head is put on each tapped map of the teacher, and one on
    each of the student's. What they detect is compared, not the maps, so that
    their channels may differ and nothing adapts them.

    .. math::
        L = \sum_i L_{det}(h^T_i) + \beta \sum_i \left[ (1 - \alpha)
            L_{det}(h^S_i) + \alpha \, D(h^S_i, h^T_i) \right]
            + \alpha \, D(h^S, h^T)

    where h without an index are the detectors' own heads and

    .. math::
        D = \tau^2 \frac{\sum_a w_a KL(p^T_a \| p^S_a)}{\sum_a w_a} +
            \lambda \frac{\sum_a w_a E(b^S_a, b^T_a)}{\sum_a w_a}, \qquad
            w_a = \max_c p^T_{ac}

    over the anchors a of all cells that are not border. p are class
    probabilities, softened by the temperature in KL and not in w; E is the
    divergence of the distributions of the four edges, averaged over them, if
    both heads have such distributions, else 1 - GIoU of the decoded boxes.

    The first sum counts while the teacher's heads learn, the others while the
    student's do, so that ``phases`` say which::

        phases = [
            dict(
                length=1,
                train=(),
                terms='heads',
                supervised=False,
                freeze='terms.heads.student_heads',
            ),
            dict(length=6, freeze='terms.heads.teacher_heads'),
        ]

    Without phases both learn side by side. The teacher's own weights never
    do; no head is part of the student that is deployed.

    Args:
        teacher: Name of the teacher.
        num_classes: Of the data set.
        strides: Pixels from cell to cell of each map that gets a head.
        channels: Of the student's maps, of all or of each.
        teacher_channels: The same of the teacher's; as the student's if None.
        tap: Where the student's maps are: a backbone, a neck, or below.
        levels: Which of them, 0 is the finest; all if None.
        teacher_tap, teacher_levels: The same of the teacher; as the student's
            if None.
        head: Config of a dense head of MMDetection's, without channels,
            classes and strides; one without a ``type`` changes the default,
            :data:`HEAD`. Of an ``FCOSHead`` every one takes objects of all
            sizes if no ``regress_ranges`` are given.
        head_channels: Of the heads' convolutions.
        teacher_head_checkpoint: File of an earlier training with this term, of
            whose teacher's heads these take the weights; they learn no more.
        final: The student's own dense head, compared as well; none if None,
            as for a detector without one.
        teacher_final: That of the teacher; as the student's if None.
        head_weight: The formula's beta.
        mix: The formula's alpha, the share of imitation.
        temperature: The formula's tau.
        box_weight: The formula's lambda.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``teacher``, and ``labels``, ``cls``, ``box``, ``final_cls`` and
        ``final_box``, as far as they count.

    Raises:
        ValueError: If strides, channels, classes or anchors do not fit, while
            the model is built; or in the first step if the heads of the
            teacher neither learn nor ever did.

    Reference:
        Wang et al., "Multi-head Knowledge Distillation for Model
        Compression", arXiv:2012.02911, for classifiers; from a description
        and the settings of a re-implementation, neither text nor code was
        read. Its published weights are the defaults. **Ours:** dense heads
        instead of pooled classifiers; that the teacher's learn beforehand;
        all of D but the divergence; and that the detection loss, of which a
        term knows nothing, keeps its factor of 1 where the last heads of the
        paper have 1 - alpha.
    """

    given, learner = 'teacher_heads', 'student_heads'
    setting = 'teacher_head_checkpoint'

    def __init__(
        self,
        teacher: str,
        num_classes: int,
        strides: Sequence[int],
        channels: int | Sequence[int] = 256,
        teacher_channels: int | Sequence[int] | None = None,
        tap: str = 'neck',
        levels: Sequence[int] | None = None,
        teacher_tap: str | None = None,
        teacher_levels: Sequence[int] | None = None,
        head: Mapping | None = None,
        head_channels: int = 256,
        teacher_head_checkpoint: str | None = None,
        final: str | None = 'bbox_head',
        teacher_final: str | None = None,
        head_weight: float = 0.5,
        mix: float = 0.1,
        temperature: float = 4.0,
        box_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(teacher_head_checkpoint, schedule)
        check_positive('MultiHeadTerm', temperature=temperature)
        check_fraction('MultiHeadTerm', mix=mix)
        self.teacher, self.num_classes = teacher, num_classes
        self.strides = tuple(strides)
        self.path, self.levels = tap, levels
        self.teacher_path = teacher_tap or tap
        self.teacher_levels = (
            levels if teacher_levels is None else teacher_levels
        )
        self.final = final
        self.teacher_final = teacher_final or final
        self.head_weight, self.mix = head_weight, mix
        self.temperature, self.box_weight = temperature, box_weight
        if teacher_channels is None:
            teacher_channels = channels
        config = _head_config(head)
        self.student_heads, self.teacher_heads = (
            nn.ModuleList(
                _head(config, num_classes, count, stride, head_channels)
                for count, stride in zip(each, self.strides)
            )
            for each in (
                _each('channels', channels, self.strides),
                _each('teacher_channels', teacher_channels, self.strides),
            )
        )
        self.hold()

    def silent(self) -> bool:
        return not (self.head_weight or self.mix)

    def compares_classes(self) -> bool:
        # Of the auxiliary heads both sides learn the data set's.
        return self.final is not None and self.final != 'rpn_head'

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        check_num_classes('MultiHeadTerm', student, self.num_classes)
        self.tap(student, self.path)
        teacher.tap(self.teacher_path)
        if self.final is None:
            return
        heads = []
        for side, detector, path in (
            ('student', student, self.final),
            ('teacher', teacher.detector, self.teacher_final),
        ):
            head, _ = resolve(detector, path)
            if not hasattr(head, 'prior_generator'):
                raise ValueError(
                    f"MultiHeadTerm compares the detectors' own dense heads "
                    f'as well, but {path} of the {side} is '
                    f'{type(head).__name__}. Set final=None, or name a dense '
                    f'head with final= and teacher_final=.'
                )
            check_decodable('MultiHeadTerm', head, side)
            heads.append(head)
        check_same_anchors('MultiHeadTerm', *heads)
        self.tap(student, self.final)
        teacher.tap(self.teacher_final)

    def forward(self, step: Step) -> dict[str, Tensor]:
        self.prepare(step)
        student, teacher = self._maps(step)
        theirs = _detect(self.teacher_heads, teacher)
        parts = {}
        if learns(self.teacher_heads):
            parts['teacher'] = self._supervised(
                self.teacher_heads, theirs, step
            )
            self.count_lesson(step)
        if learns(self.student_heads):
            ours = _detect(self.student_heads, student)
            labels = self._supervised(self.student_heads, ours, step)
            pairs = zip(self.student_heads, ours, self.teacher_heads, theirs)
            apart = [self._apart(*pair, step.gt) for pair in pairs]
            share = self.head_weight * self.mix
            parts |= dict(
                labels=self.head_weight * (1 - self.mix) * labels,
                cls=share * sum(cls for cls, _ in apart),
                box=share * sum(box for _, box in apart),
            )
            if self.final is not None:
                cls, box = self._final(step)
                parts |= dict(
                    final_cls=self.mix * cls, final_box=self.mix * box
                )
        return parts

    def _maps(self, step: Step) -> tuple[tuple[Tensor, ...], ...]:
        """Maps of both sides, a pair for each head."""
        shown = step.teacher(self.teacher)
        size = step.images.shape[-2:]
        student = _tapped(step.student, self.path, self.levels)
        teacher = _tapped(shown, self.teacher_path, self.teacher_levels)
        # A teacher that was loaded in half precision has such maps.
        teacher = [as_float(one.detach()) for one in teacher]
        teacher = crop(teacher, shown.size, size)
        for side, maps, heads in (
            ('student', student, self.student_heads),
            ('teacher', teacher, self.teacher_heads),
        ):
            self._check_maps(side, maps, heads, size)
        return student, teacher

    def _check_maps(
        self,
        side: str,
        maps: Sequence[Tensor],
        heads: nn.ModuleList,
        size: Sequence[int],
    ) -> None:
        setting = 'levels' if side == 'student' else 'teacher_levels'
        if len(maps) != len(heads):
            raise ValueError(
                f'MultiHeadTerm has {len(heads)} heads, one for each of '
                f'strides={self.strides}, got {len(maps)} maps of the {side}. '
                f'Choose as many with {setting}=.'
            )
        for one, head, stride in zip(maps, heads, self.strides):
            cells = tuple(one.shape[-2:])
            # What does not divide may be rounded either way.
            if any(
                abs(count * stride - pixels) >= stride
                for count, pixels in zip(cells, size)
            ):
                raise ValueError(
                    f'MultiHeadTerm was told of a map of the {side} with a '
                    f'cell every {stride} pixels, got {cells} cells for '
                    f'{tuple(size)} pixels. Set strides= to those of the '
                    f'maps, or choose others with {setting}=.'
                )
            check_channels('MultiHeadTerm', one, head.in_channels)

    def _supervised(
        self, heads: nn.ModuleList, outputs: Sequence[tuple], step: Step
    ) -> Tensor:
        """Detection losses of all heads, added."""
        # The distiller puts annotated images first.
        known = sum(labelled(one) for one in step.samples)
        if not known:
            return sum(zero_of(one[0][0]) for one in outputs)
        boxes, ignored, metas = unpack_gt_instances(step.samples[:known])
        total = step.images.new_zeros((), dtype=torch.float32)
        for head, output in zip(heads, outputs):
            losses = head.loss_by_feat(
                *pick(output, slice(known)), boxes, metas, ignored
            )
            total = total + as_float(detection_loss(losses))
        return total

    def _apart(
        self,
        own: nn.Module,
        student: tuple,
        other: nn.Module,
        teacher: tuple,
        gt: GroundTruth,
    ) -> tuple[Tensor, Tensor]:
        cls, box = heads_apart(
            own, student, other, teacher, gt, self.temperature
        )
        return cls, self.box_weight * box

    def _final(self, step: Step) -> tuple[Tensor, Tensor]:
        shown = step.teacher(self.teacher)
        own, _ = resolve(step.student.detector, self.final)
        other, _ = resolve(shown.detector, self.teacher_final)
        size = step.images.shape[-2:]
        teacher = tuple(
            crop(maps, shown.size, size)
            for maps in shown.at(self.teacher_final)
        )
        student = step.student.at(self.final)
        return self._apart(own, student, other, teacher, step.gt)


def heads_apart(
    own: nn.Module,
    student: Sequence[Sequence[Tensor]],
    other: nn.Module,
    teacher: Sequence[Sequence[Tensor]],
    gt: GroundTruth,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """How far apart two dense heads are, by classes and by boxes.

    Args:
        own: The student's head.
        student: Its outputs: class logits of each level, (N, A·C, H, W), what
            it says of boxes, and more that is not compared.
        other, teacher: The same of the teacher.
        gt: The batch, which knows its border.
        temperature: Of the classes.

    Returns:
        The divergence of the classes, times the squared temperature, and the
        distance of the boxes, both weighted by the teacher's largest score;
        see :class:`MultiHeadTerm`.

    Raises:
        ValueError: If classes, anchors or sizes differ.
    """
    teacher = [[one.detach() for one in maps] for maps in teacher[:2]]
    activation = (
        'sigmoid' if getattr(own, 'use_sigmoid_cls', True) else 'softmax'
    )
    logits, targets, valid = valid_samples(
        'MultiHeadTerm', student[0], teacher[0], gt, own.cls_out_channels
    )
    weight = top_score(targets, activation) * valid
    classes = soft_target_loss(
        logits, targets, weight[:, None], activation, temperature, EPS
    )
    error = torch.cat(
        [
            one.permute(0, 2, 3, 1).flatten()  # by image, row, column, anchor
            for one in _box_errors(own, student[1], other, teacher[1])
        ]
    )
    boxes = (weight * error).sum() / weight.sum().clamp(min=EPS)
    return classes, boxes


def _box_errors(
    own: nn.Module,
    student: Sequence[Tensor],
    other: nn.Module,
    teacher: Sequence[Tensor],
) -> list[Tensor]:
    """Distances of the boxes of each level, (N, A, H, W)."""
    bins = getattr(own, 'reg_max', None)
    if bins is not None and bins == getattr(other, 'reg_max', None):
        return [
            (bins + 1)
            * edge_divergence(one, like, 1.0, one.shape[1] // (4 * (bins + 1)))
            for one, like in zip(student, teacher)
        ]
    return [
        giou_error(one, like, axis=2)
        for one, like in zip(decode(own, student), decode(other, teacher))
    ]


def _tapped(
    outputs: Outputs, path: str, levels: Sequence[int] | None
) -> tuple[Tensor, ...]:
    maps = maps_of(outputs.at(path), f'The tap {path!r}')
    return pick_levels(maps, levels, repr(path))


def _detect(heads: nn.ModuleList, maps: Sequence[Tensor]) -> list[Any]:
    return [head((one,)) for head, one in zip(heads, maps)]


# Heads -----------------------------------------------------------------------


def _head_config(head: Mapping | None) -> ConfigDict:
    head = {} if head is None else head
    return ConfigDict(
        copy.deepcopy(head if 'type' in head else {**HEAD, **head})
    )


def _head(
    config: ConfigDict,
    num_classes: int,
    channels: int,
    stride: int,
    head_channels: int,
) -> nn.Module:
    """A head for one map, with the weights that MMDetection gives it."""
    config = copy.deepcopy(config)
    if 'anchor_generator' in config:
        config.anchor_generator.strides = [stride]
    else:
        config.strides = [stride]
    kind = find(config, 'head')
    if 'regress_ranges' in inspect.signature(kind).parameters:
        config.setdefault('regress_ranges', ((-1, 1e8),))
    try:
        head = build(
            config,
            'head',
            num_classes=num_classes,
            in_channels=channels,
            feat_channels=head_channels,
        )
    except ValueError as error:
        raise ValueError(
            f'MultiHeadTerm cannot build {kind.__name__} with '
            f'head_channels={head_channels} and norm_cfg='
            f'{config.get("norm_cfg")}: {error}. Set a multiple of the '
            f'groups of its norm, or another norm by head=dict(norm_cfg=…).'
        ) from error
    check_decodable('MultiHeadTerm', head, 'auxiliary side')
    head.init_weights()
    return head


def _each(
    name: str, channels: int | Sequence[int], strides: Sequence[int]
) -> tuple[int, ...]:
    if isinstance(channels, int):
        return (channels,) * len(strides)
    if len(channels) != len(strides):
        raise ValueError(
            f'MultiHeadTerm has a head for each of strides={tuple(strides)}, '
            f'got {name}={tuple(channels)}. Give {name} one entry a stride.'
        )
    return tuple(channels)
