"""Cross-head: the student's head features, judged by the teacher's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import check_name, check_positive
from mmkd.losses.bckd import bckd_class_loss
from mmkd.losses.ld import edge_divergence
from mmkd.ops.boxes import giou_error
from mmkd.ops.masks import equal_weight
from mmkd.ops.numeric import as_float, standardise
from mmkd.ops.scores import class_samples
from mmkd.registry import MODELS
from mmkd.structures import Step
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.assignment import (
    assigned_labels,
    check_assigns,
    count_positives,
)
from mmkd.terms.decoding import decode
from mmkd.terms.term import Term
from mmkd.terms.weights.positive import best, spread

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Towers of a dense head: of classes and of boxes.
TOWERS = ('cls_convs', 'reg_convs')


@MODELS.register_module()
class CrossHeadTerm(Term):
    r"""The student's features, sent through the rest of the teacher's head.

    In each tower the student's map after ``convs`` convolutions, before the
    activation, is brought to the teacher's mean and deviation per channel,
    activated, and run through the teacher's frozen remaining layers. What they
    predict, :math:`\hat z`, is compared with what the teacher itself predicts,
    z. The student's own predictions see the ground truth alone.

    .. math::
        L_{cls} &= \frac{1}{P} \sum_{ic} |\sigma(\hat z_{ic}) -
                   \sigma(z_{ic})|^\beta \, BCE(\hat z_{ic}, \sigma(z_{ic})) \\
        L_{box} &= \frac{\sum_i w_i D(\hat b_i, b_i)}{W}, \qquad
                   w_i = \max_c \sigma(z_{ic})

    P is the number of the student's positives. For a head of distributions D
    is the divergence of the four edges, averaged over the edges, and W the sum
    of w; for others D is 1 - GIoU of the decoded boxes and W is P.

    The teacher's head decides on classes and anchors, so that the student's
    may be others; only strides and the channels of the towers must fit.

    Args:
        teacher: Name of the teacher.
        tap: The dense head of both; it has towers ``cls_convs`` and
            ``reg_convs`` that all levels share.
        convs: Convolutions of the student before the crossing. Published: 3
            of 4; for FCOS 2.
        class_weight: Factor of ``cls``. Published: 1; for FCOS 0.4.
        box_weight: Factor of ``box``. Published: 4 for GFL, 1 for RetinaNet
            and ATSS, 0.75 for FCOS.
        centerness_weight: Factor of ``centerness``, a binary cross entropy at
            the student's positives, for heads that predict it. Published: 1
            for ATSS.
        power: Exponent of the difference, at least 1.
        temperature: Of the distributions of edges.
        align: Config of the neck that brings the student's channels to the
            teacher's; none if None.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``cls``, ``box`` and, if weighted, ``centerness``.

    Raises:
        ValueError: If the heads have no such towers, or strides, channels or
            numbers of levels differ, while the model is built.

    Reference:
        Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object
        Detection", CVPR 2024, arXiv:2306.11369, from a summary of formulas and
        settings; neither text nor code was read. For FCOS the authors divide
        by the sum of the centerness targets and take IoU; here P and GIoU.
    """

    def __init__(
        self,
        teacher: str,
        tap: str = 'bbox_head',
        convs: int = 3,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        centerness_weight: float = 0.0,
        power: float = 1.0,
        temperature: float = 1.0,
        align: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive('CrossHeadTerm', convs=convs, temperature=temperature)
        if not power >= 1:
            raise ValueError(
                f'CrossHeadTerm needs power >= 1, for below the gradient is '
                f'infinite where both sides agree; got power={power!r}.'
            )
        self.teacher, self.head, self.convs = teacher, tap, convs
        self.class_weight, self.box_weight = class_weight, box_weight
        self.centerness_weight = centerness_weight
        self.power, self.temperature = power, temperature
        self.aligns = nn.ModuleDict()
        if align is not None:
            self.aligns.update(
                {tower: build(align, 'align') for tower in TOWERS}
            )

    @property
    def targets(self) -> str:
        """The method whose output is the student's label assignment."""
        return f'{self.head}.get_targets'

    def silent(self) -> bool:
        return not (
            self.class_weight or self.box_weight or self.centerness_weight
        )

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        own = _head(student, self.head, 'student')
        other = _head(teacher.detector, self.head, 'teacher')
        check_assigns(
            'CrossHeadTerm', own, 'Choose a term on features for this pair.'
        )
        _check_strides(own, other)
        self.paths = {}
        for tower in TOWERS:
            convs = [
                _convolution(head, tower, self.convs, side)
                for head, side in ((own, 'student'), (other, 'teacher'))
            ]
            self._check_channels(tower, *convs)
            paths = []
            for conv in convs:
                # Else the activation would overwrite what is tapped.
                conv.activate.inplace = False
                layer = conv.norm_name if conv.with_norm else 'conv'
                place = f'{tower}.{self.convs - 1}.{layer}'
                paths.append(f'{self.head}.{place}')
            self.tap(student, paths[0])
            teacher.tap(paths[1])
            self.paths[tower] = paths
        self.tap(student, self.targets)
        teacher.tap(self.head)

    def _check_channels(
        self, tower: str, own: ConvModule, other: ConvModule
    ) -> None:
        if self.aligns or own.out_channels == other.out_channels:
            return
        raise ValueError(
            f"CrossHeadTerm runs the student's {tower} through the teacher's, "
            f'but they have {own.out_channels} and {other.out_channels} '
            f"channels. Add align=dict(type='mmkd.ConvAdapt', "
            f'in_channels={own.out_channels}, '
            f'out_channels={other.out_channels}, num_levels=N) with the '
            f'number of levels.'
        )

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        head = getattr(shown.detector, self.head)
        crossed = _levels(self._crossed(step, head))
        size = step.images.shape[-2:]
        given = [
            crop(level, shown.size, size)
            for level in _levels(shown.at(self.head))
        ]
        labels = assigned_labels(step, self.head)
        own = getattr(step.student.detector, self.head)
        positive = count_positives(labels, own.num_classes)
        counts = [equal_weight(step.gt, level[0]) for level in given]
        trust = [
            best(scores, scores.shape[1] // head.cls_out_channels) * count
            for (scores, *_), count in zip(given, counts)
        ]
        shares = dict(
            cls=self.class_weight
            * self._classes(crossed, given, counts, head)
            / positive,
            box=self.box_weight
            * self._boxes(crossed, given, trust, head, positive),
        )
        if self.centerness_weight:
            shares['centerness'] = (
                self.centerness_weight
                * self._centerness(crossed, given, labels, own)
                / positive
            )
        return shares

    def _crossed(self, step: Step, head: nn.Module) -> Any:
        """What the teacher's head makes of the student's features."""
        maps = {}
        for tower, (own, other) in self.paths.items():
            student = maps_of(step.student.at(own), own)
            teacher = maps_of(step.teacher(self.teacher).at(other), other)
            if tower in self.aligns:
                student = self.aligns[tower](student, teacher)
            activate = getattr(head, tower)[self.convs - 1].activate
            maps[tower] = [
                activate(rescale(one, like))
                for one, like in zip(student, teacher)
            ]
        with _entered(head, maps, self.convs):
            return head(maps[TOWERS[0]])

    def _classes(
        self,
        crossed: Sequence,
        given: Sequence,
        counts: Sequence[Tensor],
        head: nn.Module,
    ) -> Tensor:
        classes = head.cls_out_channels
        loss = 0.0
        for one, other, count in zip(crossed, given, counts):
            samples = bckd_class_loss(
                class_samples([one[0]], classes),
                class_samples([other[0]], classes),
                self.power,
            )
            cells = count.permute(0, 2, 3, 1)
            anchors = one[0].shape[1] // classes
            cells = cells.expand(-1, -1, -1, anchors)
            loss = loss + (cells.flatten() * samples).sum()
        return loss

    def _boxes(
        self,
        crossed: Sequence,
        given: Sequence,
        trust: Sequence[Tensor],
        head: nn.Module,
        positive: Tensor,
    ) -> Tensor:
        if hasattr(head, 'reg_max'):
            loss = sum(
                (
                    weight
                    * (head.reg_max + 1)
                    * edge_divergence(
                        one[1], other[1], self.temperature, weight.shape[1]
                    )
                ).sum()
                for one, other, weight in zip(crossed, given, trust)
            )
            total = sum(weight.sum() for weight in trust)
            return loss / reduce_mean(total).clamp(min=1)
        boxes = (
            decode(head, [x[1] for x in group]) for group in (crossed, given)
        )
        loss = sum(
            (weight * giou_error(*pair, axis=2)).sum()
            for weight, *pair in zip(trust, *boxes)
        )
        return loss / positive

    def _centerness(
        self,
        crossed: Sequence,
        given: Sequence,
        labels: Sequence[Tensor],
        own: nn.Module,
    ) -> Tensor:
        loss = 0.0
        for one, other, label in zip(crossed, given, labels):
            if len(other) < 3:
                raise ValueError(
                    f"CrossHeadTerm {self.name!r}: the teacher's head "
                    f'predicts no centerness. Set centerness_weight=0.'
                )
            cells = spread(label, other[2])
            inside = (cells >= 0) & (cells < own.num_classes)
            error = F.binary_cross_entropy_with_logits(
                as_float(one[2]),
                as_float(other[2]).sigmoid(),
                reduction='none',
            )
            loss = loss + (inside * error).sum()
        return loss


def rescale(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """A map with the mean and deviation of another, channel by channel.

    Args:
        student: (N, C, H, W).
        teacher: Of the same channels.
        eps: Added to the student's deviation.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(rescale(5 * x - 1, x), x, atol=1e-4)
        True
    """
    std, mean = torch.std_mean(
        as_float(teacher), dim=(0, 2, 3), correction=0, keepdim=True
    )
    return standardise(student, eps) * std + mean


def _levels(outputs: Any) -> list[tuple]:
    """A head's outputs, level by level: scores, boxes and what follows."""
    return list(zip(*outputs))


class _Entry(nn.Module):
    """Takes the place of a tower's first layers and gives their result."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        super().__init__()
        self.maps = iter(maps)

    def forward(self, _: Tensor) -> Tensor:
        return next(self.maps)


@contextmanager
def _entered(
    head: nn.Module, maps: Mapping[str, Sequence[Tensor]], convs: int
) -> Iterator[None]:
    """Let the head's towers start from maps that are there."""
    whole = {tower: getattr(head, tower) for tower in maps}
    try:
        for tower, layers in whole.items():
            head._modules[tower] = nn.ModuleList(
                [_Entry(maps[tower]), *layers[convs:]]
            )
        yield
    finally:
        head._modules.update(whole)


def _head(detector: nn.Module, tap: str, side: str) -> nn.Module:
    head, _ = resolve(detector, tap)
    if not all(
        isinstance(getattr(head, tower, None), nn.ModuleList)
        for tower in TOWERS
    ):
        raise ValueError(
            f'CrossHeadTerm needs a dense head with towers '
            f'{" and ".join(TOWERS)}, but {tap} of the {side} '
            f'({type(detector).__name__}) is {type(head).__name__}. Choose a '
            f'term on features for this pair.'
        )
    return head


def _convolution(
    head: nn.Module, tower: str, convs: int, side: str
) -> ConvModule:
    layers = getattr(head, tower)
    if convs > len(layers):
        raise ValueError(
            f'CrossHeadTerm crosses after {convs} convolutions, but the '
            f"{side}'s {tower} has {len(layers)}. Set convs to at most "
            f'{len(layers)}.'
        )
    conv = layers[convs - 1]
    if not isinstance(conv, ConvModule) or not conv.with_activation:
        raise ValueError(
            f'CrossHeadTerm needs convolutions with an activation that all '
            f"levels share; the {side}'s {tower} holds "
            f'{type(conv).__name__}. Choose a term on features for this pair.'
        )
    return conv


def _check_strides(own: nn.Module, other: nn.Module) -> None:
    strides = [
        [tuple(one) for one in head.prior_generator.strides]
        for head in (own, other)
    ]
    if strides[0] != strides[1]:
        raise ValueError(
            f'CrossHeadTerm needs heads of the same strides, the student has '
            f'{strides[0]} and the teacher {strides[1]}. Choose a term on '
            f'features, which pairs levels one by one.'
        )
