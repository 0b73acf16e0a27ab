"""GID: imitate the teacher wherever the two detectors disagree most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import (
    CenterNetUpdateHead,
    DDODHead,
    PAAHead,
    RTMDetHead,
    TOODHead,
)
from mmdet.models.losses import L1Loss, SmoothL1Loss
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmkd.build import build
from mmkd.checks import (
    check_fraction,
    check_name,
    check_positive,
    check_same_shape,
)
from mmkd.ops.boxes import giou_error, iou
from mmkd.ops.numeric import as_float, full_precision
from mmkd.ops.regions import pyramid_bins, pyramid_level
from mmkd.ops.scores import bernoulli_divergence
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.taps import crop, maps_of, resolve
from mmkd.terms.assignment import by_level
from mmkd.terms.decoding import (
    anchors_of,
    check_decodable,
    decode,
)
from mmkd.terms.term import Term
from mmkd.terms.weights.positive import spread
from mmkd.terms.weights.score import refuse_softmax

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Boxes of an image that compete to be instances, the most disputed ones.
CANDIDATES = 3000
#: Sides of a box that is no instance, up to so many pixels.
SMALLEST = 10
#: A box with this root of its area, in pixels, is read from the level of
#: this stride, one of twice the side from the next.
SIDE, STRIDE = 224, 16
#: Heads whose get_targets reads predictions as well, or other arguments.
ASSIGN_OTHERWISE = (CenterNetUpdateHead, DDODHead, PAAHead, RTMDetHead)


@MODELS.register_module()
class InstanceTerm(Term):
    r"""Features, relations and predictions of the most disputed boxes.

    At each anchor of two dense heads the dispute and the box are

    .. math::
        s = \max_c |p^T_c - p^S_c|, \qquad
        b = \begin{cases}
            b^T & \max_c p^T_c > \max_c p^S_c \\ b^S & \text{else}
        \end{cases}

    Of an image, suppression leaves at most ``topk`` such boxes, the general
    instances; objects or not. Each is read by RoIAlign from the level of its
    size, which gives :math:`t_k`, C channels of ``bins`` x ``bins``. Over the
    K instances of the batch:

    .. math::
        feature &= \frac{1}{K bins^2} \sum_k \|t^S_k - t^T_k\|_2^2 \\
        relation &= \frac{1}{K (K - 1)} \sum_{i \ne j} smooth_{L1} \left(
            \frac{\|t^S_i - t^S_j\|}{d^S} - \frac{\|t^T_i - t^T_j\|}{d^T}
            \right) \\
        cls &= \frac{1}{P} \sum_a \sum_c KL(p^T_{ac}, p^S_{ac}) \\
        box &= \frac{1}{P} \sum_a D(b^S_a, b^T_a)

    d is the mean distance of two instances. The last two run over the P
    anchors that the student's own label assignment holds for positive when
    the instances are its objects. D is the sum of absolute differences of the
    offsets, if both heads are trained so, and on the same offsets (RetinaNet);
    1 - GIoU of the decoded boxes for others (GFL, ATSS, FCOS). Heads whose
    assignment reads predictions as well (DDOD, PAA, RTMDet) or is not told
    level by level (CenterNet's update) have the first two parts only.

    Suppression is greedy, as that of any NMS, but stops at ``topk`` boxes:
    as many rounds for all images at once, whatever the number of boxes, and
    nothing waits for the device. The assignment waits, as those of MMDetection
    do, and around it the number of instances and of their anchors is asked.
    Without ``class_weight`` and ``box_weight`` there is none.

    Args:
        teacher: Name of the teacher.
        tap: The dense head of both.
        neck: Whose maps of both the instances are read from, one a level of
            the head.
        topk: Instances of an image.
        max_overlap: IoU up to which two boxes may both be instances.
        bins: Of an instance, in each direction.
        feature_weight, relation_weight, class_weight, box_weight: Factors of
            the parts. Published for RetinaNet: the defaults.
        align: Config of the neck that brings the student's channels to the
            teacher's; none if None.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``feature``, ``relation``, ``cls`` and ``box``; the last two only if
        one of them is weighted.

    Raises:
        ValueError: If the heads differ in classes, strides or anchors, their
            boxes cannot be read, or their scores are no logits of a sigmoid
            each.

    Reference:
        Dai et al., "General Instance Distillation for Object Detection", CVPR
        2021, arXiv:2103.02340. Read: the abstract, and the first author's
        reproduction (https://github.com/daixinghome/Distill_GID_detectron2)
        for facts, which its README does not call final. There the dispute is
        the difference of the two largest probabilities, the classes have a
        binary cross entropy, whose gradient is the same, the student's adapter
        is built and never used, and two instances have no relation, which
        here is 0 as well. The 1 - GIoU is ours.
    """

    def __init__(
        self,
        teacher: str,
        tap: str = 'bbox_head',
        neck: str = 'neck',
        topk: int = 10,
        max_overlap: float = 0.3,
        bins: int = 10,
        feature_weight: float = 5e-4,
        relation_weight: float = 40.0,
        class_weight: float = 0.1,
        box_weight: float = 1.0,
        align: Mapping | None = None,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive('InstanceTerm', topk=topk, bins=bins)
        check_fraction('InstanceTerm', max_overlap=max_overlap)
        self.teacher, self.head, self.neck = teacher, tap, neck
        self.topk, self.max_overlap, self.bins = topk, max_overlap, bins
        self.feature_weight = feature_weight
        self.relation_weight = relation_weight
        self.class_weight, self.box_weight = class_weight, box_weight
        self.align = None if align is None else build(align, 'align')

    def silent(self) -> bool:
        return not (
            self.feature_weight
            or self.relation_weight
            or self.class_weight
            or self.box_weight
        )

    def compares_classes(self) -> bool:
        return True

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        for path in (self.head, self.neck):
            self.tap(student, path)
            teacher.tap(path)
        heads = []
        for detector, side in (
            (student, 'student'),
            (teacher.detector, 'teacher'),
        ):
            head, _ = resolve(detector, self.head)
            check_decodable('InstanceTerm', head, side)
            refuse_softmax('InstanceTerm', detector, self.head, side)
            _check_logits(head, side)
            if side == 'student' and (self.class_weight or self.box_weight):
                _check_assigns(head)
            heads.append(head)
        _check_alike(*heads)

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        own, _ = resolve(step.student.detector, self.head)
        other, _ = resolve(shown.detector, self.head)
        who = f'The tap {self.head!r}'
        student, teacher = (
            [maps_of(one.at(self.head), who, output) for output in (0, 1)]
            for one in (step.student, shown)
        )
        size = step.images.shape[-2:]
        teacher = [
            [one.detach() for one in crop(maps, shown.size, size)]
            for maps in teacher
        ]
        decoded = decode(own, student[1]), decode(other, teacher[1])
        classes = own.cls_out_channels
        # Else the probabilities of every anchor would be kept for backward.
        with torch.no_grad():
            disputes, boxes = dispute(
                student[0], teacher[0], *decoded, classes
            )
            boxes = _clipped(boxes, step.gt.image_shapes)
            sides = boxes[..., 2:] - boxes[..., :2]
            disputes = disputes * (sides > SMALLEST).all(2)
            boxes, there = select(disputes, boxes, self.topk, self.max_overlap)
        parts = self._of_features(step, shown, boxes, there, own)
        if not (self.class_weight or self.box_weight):
            return parts
        places = assign(own, student[0], boxes, there, step.samples)
        count = max(1, sum(len(place[0]) for place in places))
        logits = (
            _rows([one.unflatten(1, (-1, classes)) for one in side[0]], places)
            for side in (student, teacher)
        )
        parts['cls'] = (
            self.class_weight * bernoulli_divergence(*logits).sum() / count
        )
        if _offsets(own, other):
            offsets = (
                _rows([one.unflatten(1, (-1, 4)) for one in side[1]], places)
                for side in (student, teacher)
            )
            error = F.l1_loss(*offsets, reduction='sum')
        else:
            corners = (_rows(side, places) for side in decoded)
            error = giou_error(*corners).sum()
        parts['box'] = self.box_weight * error / count
        return parts

    def _of_features(
        self,
        step: Step,
        shown: Outputs,
        boxes: Tensor,
        there: Tensor,
        head: nn.Module,
    ) -> dict[str, Tensor]:
        who = f'The tap {self.neck!r}'
        student = maps_of(step.student.at(self.neck), who)
        teacher = [one.detach() for one in maps_of(shown.at(self.neck), who)]
        if self.align is not None:
            student = self.align(student, teacher)
        _check_levels(head, self.neck, student, teacher)
        size = tuple(step.images.shape[-2:])
        level = levels_of(boxes, head)
        own, like = (
            read(maps, boxes, level, seen, self.bins)
            for maps, seen in (
                (student, size),
                (teacher, tuple(shown.size or size)),
            )
        )
        check_same_shape('InstanceTerm', own, like)
        there = there.flatten().to(own)
        error = (own - like).square().flatten(1).sum(1)
        count = there.sum().clamp(min=1)
        feature = (there * error).sum() / (count * self.bins**2)
        relation = relate(own.flatten(1), like.flatten(1), there)
        return dict(
            feature=self.feature_weight * feature,
            relation=self.relation_weight * relation,
        )


# Instances -------------------------------------------------------------------


def dispute(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    student_boxes: Sequence[Tensor],
    teacher_boxes: Sequence[Tensor],
    classes: int,
) -> tuple[Tensor, Tensor]:
    """How far the two differ at each anchor, and the surer one's box.

    Args:
        student, teacher: Logits of each level, (N, A·C, H, W).
        student_boxes, teacher_boxes: As :func:`decode` returns them.
        classes: C.

    Returns:
        Scores in [0, 1], (N, P), and x1 y1 x2 y2, (N, P, 4), of the P anchors
        of all levels.
    """
    scores, boxes = [], []
    for *logits, own, other in zip(
        student, teacher, student_boxes, teacher_boxes
    ):
        one, like = (
            as_float(x).sigmoid().unflatten(1, (-1, classes)) for x in logits
        )
        scores.append((like - one).abs().amax(2).flatten(1))
        surer = like.amax(2, keepdim=True) > one.amax(2, keepdim=True)
        boxes.append(
            torch.where(surer, other, own).movedim(2, -1).flatten(1, 3)
        )
    return torch.cat(scores, 1), torch.cat(boxes, 1)


def select(
    scores: Tensor, boxes: Tensor, topk: int, max_overlap: float
) -> tuple[Tensor, Tensor]:
    """Greedy suppression, all images at once, that stops at ``topk`` boxes.

    Args:
        scores: What is highest is taken first, what is 0 never, (N, P).
        boxes: x1 y1 x2 y2, (N, P, 4).
        topk: Boxes of an image.
        max_overlap: IoU with a box that is taken above which one is not.

    Returns:
        Boxes, (N, topk, 4), and whether each is there, (N, topk); those that
        are stand first, the others are all 0.

    Example:
        >>> boxes = torch.tensor(
        ...     [[[0.0, 0, 9, 9], [1, 0, 9, 9], [9, 9, 12, 12]]]
        ... )
        >>> found, there = select(
        ...     torch.tensor([[0.5, 0.9, 0.1]]), boxes, 3, 0.3
        ... )
        >>> found[0, :2].tolist(), there.tolist()
        ([[1.0, 0.0, 9.0, 9.0], [9.0, 9.0, 12.0, 12.0]], [[True, True, False]])
    """
    scores, order = scores.topk(min(CANDIDATES, scores.shape[1]), dim=1)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    found, there = [], []
    for _ in range(topk):
        best, index = scores.max(1, keepdim=True)
        box = boxes.gather(1, index[..., None].expand(-1, -1, 4))  # N, 1, 4
        scores = scores.masked_fill(iou(boxes, box) > max_overlap, 0)
        there.append(best > 0)
        found.append(torch.where(best[..., None] > 0, box, 0))
    return torch.cat(found, 1), torch.cat(there, 1)


def _clipped(boxes: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Boxes without what lies beyond their own image, (N, P, 4)."""
    corners = []
    for one, (height, width) in zip(boxes, shapes):
        x, y = one[:, 0::2].clamp(0, width), one[:, 1::2].clamp(0, height)
        corners.append(torch.stack([x, y], 2).flatten(1))
    return torch.stack(corners)


# Features and relations ------------------------------------------------------


def levels_of(boxes: Tensor, head: nn.Module) -> Tensor:
    """Index of the level that each box is read from, (N, K, 4) → (N, K)."""
    strides = [stride for stride, _ in head.prior_generator.strides]
    return pyramid_level(boxes, strides, SIDE, STRIDE)


def read(
    maps: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor,
    size: tuple[int, int],
    bins: int,
) -> Tensor:
    """What the maps hold at boxes, each at its level.

    Args:
        maps: (N, C, H, W) a level.
        boxes: x1 y1 x2 y2 in pixels, (N, K, 4).
        level: Index of each box's level, (N, K).
        size: Height and width that the maps cover, pixels.
        bins: In each direction.

    Returns:
        (N·K, C, bins, bins), float32.
    """
    images = torch.arange(len(boxes), device=boxes.device)
    image = images[:, None].expand(boxes.shape[:2])
    return pyramid_bins(
        maps, boxes.flatten(0, 1), image.flatten(), level.flatten(), size, bins
    )


def relate(student: Tensor, teacher: Tensor, there: Tensor) -> Tensor:
    """Smooth L1 between distances of pairs, each divided by their mean.

    Args:
        student, teacher: Vectors of K instances, (K, D).
        there: 1 for the instances that count, 0 for others, (K,).

    Returns:
        Mean over the pairs that differ; 0 if there are none.
    """
    pairs = there[:, None] * there
    pairs = pairs - pairs.diag().diag()
    count = pairs.sum().clamp(min=1)
    own, other = (
        _distances(one, there, pairs, count) for one in (student, teacher)
    )
    error = F.smooth_l1_loss(own, other, reduction='none')
    return (pairs * error).sum() / count


def _distances(
    vectors: Tensor, there: Tensor, pairs: Tensor, count: Tensor
) -> Tensor:
    """Distances of pairs, divided by their mean, (K, K)."""
    # Distances by products, for differences of all pairs would not fit; from
    # the centre, so that they are not lost in the length of what is common.
    total = there.sum().clamp(min=1)
    vectors = vectors - (there[:, None] * vectors).sum(0) / total
    square = vectors.square().sum(1)
    with full_precision(vectors):
        product = vectors @ vectors.T
    square = square[:, None] + square - 2 * product
    # A root has no derivative at 0, where an instance meets itself.
    distance = square.clamp(min=1e-12).sqrt()
    mean = (pairs * distance).sum() / count
    return distance / mean.clamp(min=1e-6)


# Predictions -----------------------------------------------------------------


def assign(
    head: nn.Module,
    scores: Sequence[Tensor],
    boxes: Tensor,
    there: Tensor,
    samples: Sequence,
) -> list[tuple[Tensor, ...]]:
    """The anchors that a head would train if boxes were its objects.

    Args:
        head: The head, whose assignment is used.
        scores: Its logits of each level, (N, A·C, H, W).
        boxes: x1 y1 x2 y2, (N, K, 4).
        there: Which of them are there, the first of each image, (N, K).
        samples: mmdet's sample of each image.

    Returns:
        Image, anchor, row and column of those of each level.
    """
    objects = [
        InstanceData(
            bboxes=one[:count],
            labels=torch.zeros(count, dtype=torch.long, device=one.device),
        )
        for one, count in zip(boxes, there.sum(1).tolist())
    ]
    sizes = [tuple(one.shape[-2:]) for one in scores]
    if hasattr(head, 'get_anchors'):
        metas = [sample.metainfo for sample in samples]
        anchors = head.get_anchors(sizes, metas, device=boxes.device)
        targets = head.get_targets(*anchors, objects, metas)
    else:
        points = head.prior_generator.grid_priors(
            sizes, dtype=boxes.dtype, device=boxes.device
        )
        targets = head.get_targets(points, objects)
    # All are of class 0; what is none has the number of classes.
    return [
        (spread(label, score) == 0).nonzero(as_tuple=True)
        for label, score in zip(by_level(targets, integers=True), scores)
    ]


def _rows(
    maps: Sequence[Tensor], places: Sequence[tuple[Tensor, ...]]
) -> Tensor:
    """What maps (N, A, K, H, W) hold at anchors of all levels, (P, K)."""
    return torch.cat(
        [
            as_float(one.movedim(2, -1)[place])
            for one, place in zip(maps, places)
        ]
    )


def _offsets(own: nn.Module, other: nn.Module) -> bool:
    """Whether both heads are trained to predict offsets, and the same."""
    return all(
        isinstance(head.loss_bbox, (L1Loss, SmoothL1Loss))
        and not getattr(head, 'reg_decoded_bbox', True)
        for head in (own, other)
    ) and vars(own.bbox_coder) == vars(other.bbox_coder)


# Heads -----------------------------------------------------------------------


def _check_alike(own: nn.Module, other: nn.Module) -> None:
    for what, of in (
        ('classes', lambda head: head.cls_out_channels),
        ('strides', lambda head: head.prior_generator.strides),
        ('anchors a cell', _anchors),
    ):
        found = of(own), of(other)
        if found[0] != found[1]:
            raise ValueError(
                f'InstanceTerm compares predictions anchor by anchor. The '
                f'student has {what}: {found[0]}, the teacher {found[1]}. '
                f'Choose a teacher with the same, or a term on features.'
            )


def _anchors(head: nn.Module) -> list[int]:
    levels = range(head.prior_generator.num_levels)
    return [anchors_of(head, level) for level in levels]


def _check_logits(head: nn.Module, side: str) -> None:
    if isinstance(head, TOODHead):
        raise ValueError(
            f'InstanceTerm reads class scores before their sigmoid, but the '
            f"{side}'s {type(head).__name__} gives probabilities. Choose a "
            f'term on features for this pair, for instance mmkd.FeatureTerm.'
        )


def _takes_boxes(head: nn.Module) -> bool:
    """Whether a head assigns boxes to anchors or points by these alone."""
    if not hasattr(head, 'get_targets'):
        return False
    needs = {
        name
        for name, one in signature(head.get_targets).parameters.items()
        if one.default is one.empty
    }
    return needs <= {
        'anchor_list',
        'valid_flag_list',
        'points',
        'batch_gt_instances',
        'batch_img_metas',
    }


def _check_assigns(head: nn.Module) -> None:
    if isinstance(head, ASSIGN_OTHERWISE) or not _takes_boxes(head):
        raise ValueError(
            f'InstanceTerm lets the student assign the instances, and '
            f'{type(head).__name__} has no get_targets that needs boxes '
            f'alone. Set class_weight=0 and box_weight=0.'
        )


def _check_levels(
    head: nn.Module, neck: str, student: Sequence, teacher: Sequence
) -> None:
    levels = head.prior_generator.num_levels
    if {len(student), len(teacher)} != {levels}:
        raise ValueError(
            f'InstanceTerm reads instances from the maps that the heads see, '
            f'{levels} levels, but {neck!r} has {len(student)} of the student '
            f'and {len(teacher)} of the teacher. Name the tap that feeds the '
            f"head: neck='…'."
        )
