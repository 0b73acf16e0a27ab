"""DETRDistill: matched answers, features of targets, the teacher's queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from mmdet.models.losses import QualityFocalLoss
from torch import Tensor, nn

from mmkd.checks import check_channels, check_fraction
from mmkd.losses.query import query_box_errors, query_class_divergence
from mmkd.ops.boxes import corners, iou
from mmkd.ops.matching import pick_queries
from mmkd.ops.numeric import as_float, full_precision, unit
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.taps import crop
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import (
    HEAD,
    Answers,
    answers,
    ask,
    bind_queries,
    question,
)
from mmkd.terms.query_matching import (
    Objects,
    check_form,
    class_logits,
    inside_maps,
    maps_path,
    match_answers,
    match_objects,
    memory_maps,
    nearest_map,
    of_layers,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class DETRDistillTerm(Term):
    r"""What a detector of queries says, where it looks, and what it asks.

    **Answers.** In every layer of the decoder the teacher's queries are
    matched to the objects, which makes them positive or negative, and the
    student's to the teacher's, one to one. Student's layer n learns from
    layer m(n) of the teacher. Positives give classes and boxes, negatives
    boxes alone, each averaged by layer and added over layers:

    .. math::
        classes &= 2 \, D(p^S, p^T) \qquad
        boxes = 5 \lVert b^S - b^T \rVert_1 + 2 (1 - GIoU(b^S, b^T))

    D is the divergence of classes. The matching minimises the same sum, so
    that a copy of the teacher finds itself and the share is 0.

    **Features.** Query i of the teacher's last layer, of state s and quality
    q, looks at the cells x of the encoder's memory F that resemble it:

    .. math::
        q_i &= \max_g c_{ig}^{\gamma} \, IoU(b_i, b_g)^{1 - \gamma}
        \qquad \psi_i(x) = \cos(s_i, F^T(x)) \\
        feature &= \frac{1}{|X| D} \sum_x \frac{\sum_i q_i \psi_i(x)^2}
            {\sum_i q_i} \lVert F^S(x) - F^T(x) \rVert^2

    c is the chance of the class of object g. The mask stands inside of the
    norm, so that its sign does not matter. Cells of the padded border do not
    count, and images without objects have no targets. Levels of unlike size
    are paired with the nearest, the student's resized.

    **Prior.** The student's decoder is asked the teacher's queries as well,
    in a pass of their own, and what it answers has the student's own losses
    of class and box, by layer, with the object of each query taken from the
    teacher's matching and not sought anew.

    Args:
        teacher: Name of the teacher.
        channels: Width of the memory of student and teacher, between which a
            linear layer learns along; none if None.
        positive_weight, negative_weight: Of the answers of both kinds.
        feature_weight: Of the features.
        prior_weight: Of the teacher's queries. Needs decoders that are asked
            in one form; 0 for others.
        class_weight, l1_weight, giou_weight: Of classes and boxes, in the
            matching and in what is learnt by it. Those of DETR's kind.
        gamma: Share of the class in a query's quality, of 1.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``classes``, ``boxes``, ``negatives``, ``feature`` and ``prior``, as
        far as they have a weight.

    Raises:
        ValueError: If one side has no queries, the widths of the memories do
            not fit, or the queries are not of one form, while the model is
            built.

    Reference:
        Chang et al., "DETRDistill: A Universal Knowledge Distillation
        Framework for DETR-families", ICCV 2023, arXiv:2211.10156. Read: a
        summary; no code. Ours: all weights and gamma, the divergence in the
        matching, one matching of positives and negatives together, the best
        object in the quality, states in place of queries, and that masks are
        divided by the sum of the qualities.
    """

    def __init__(
        self,
        teacher: str,
        channels: tuple[int, int] | None = None,
        positive_weight: float = 1.0,
        negative_weight: float = 1.0,
        feature_weight: float = 1.0,
        prior_weight: float = 1.0,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        gamma: float = 0.5,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_fraction('DETRDistillTerm', gamma=gamma)
        self.teacher = teacher
        self.channels = None if channels is None else tuple(channels)
        self.positive_weight = positive_weight
        self.negative_weight = negative_weight
        self.feature_weight = feature_weight
        self.prior_weight = prior_weight
        self.class_weight = class_weight
        self.l1_weight, self.giou_weight = l1_weight, giou_weight
        self.gamma = gamma
        self.align = None
        if self.channels is not None and feature_weight:
            self.align = nn.Linear(*self.channels)

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        teacher = bind_queries(self, student, teachers, self.teacher)
        if self.feature_weight:
            self.tap(student, maps_path(student))
            teacher.tap(maps_path(teacher.detector))

    def silent(self) -> bool:
        return not any(
            (
                self.positive_weight,
                self.negative_weight,
                self.feature_weight,
                self.prior_weight,
            )
        )

    def compares_classes(self) -> bool:
        return True

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        own, other = answers(step.student), answers(shown).detach()
        layers = uniform_map(len(own.boxes), len(other.boxes))
        other = of_layers(other, layers)
        objects = Objects.of(step.gt)
        parts = {}
        with full_precision(own.boxes):
            owner = match_objects(
                other, objects, self.l1_weight, self.giou_weight
            )
            if self.positive_weight or self.negative_weight:
                parts |= self._answers(own, other, owner >= 0)
            if self.feature_weight:
                parts['feature'] = self._feature(
                    step, shown, query_quality(other, objects, self.gamma)
                )
        if self.prior_weight:
            parts['prior'] = self._prior(step.student, shown, objects, owner)
        return parts

    def _answers(
        self, own: Answers, other: Answers, positive: Tensor
    ) -> dict[str, Tensor]:
        index, found = match_answers(
            own,
            other,
            self.class_weight,
            self.l1_weight,
            self.giou_weight,
            first=positive,
        )
        logits, targets, softmax = class_logits(own, other)
        classes = query_class_divergence(
            pick_queries(logits, index), targets, softmax
        )
        l1, error = query_box_errors(
            pick_queries(own.boxes, index), other.boxes
        )
        boxes = self.l1_weight * l1 + self.giou_weight * error
        yes, no = found & positive, found & ~positive
        return dict(
            classes=self.positive_weight
            * self.class_weight
            * by_layer(classes, yes),
            boxes=self.positive_weight * by_layer(boxes, yes),
            negatives=self.negative_weight * by_layer(boxes, no),
        )

    def _feature(self, step: Step, shown: Outputs, quality: Tensor) -> Tensor:
        student, teacher = memory_maps(step.student), memory_maps(shown)
        if self.align is not None:
            for maps, expected in zip((student, teacher), self.channels):
                check_channels('DETRDistillTerm', maps[0], expected)
            weight = self.align.weight
            student = [
                self.align(one.to(weight.dtype).movedim(1, -1)).movedim(-1, 1)
                for one in student
            ]
        _check_widths(student[0], teacher[0])
        queries = answers(shown).states[-1]
        size = step.images.shape[-2:]
        teacher, masks, inside = (
            crop(maps, shown.size, size)
            for maps in (
                teacher,
                [target_mask(one, queries, quality) for one in teacher],
                inside_maps(shown),
            )
        )
        total, cells = 0.0, 0.0
        for one in student:
            level = nearest_map(one, teacher)
            like = as_float(teacher[level])
            if one.shape[-2:] != like.shape[-2:]:
                one = F.interpolate(
                    as_float(one), like.shape[-2:], mode='bilinear'
                )
            error = (as_float(one) - like).square().mean(1, keepdim=True)
            total = total + (masks[level] * inside[level] * error).sum()
            cells = cells + inside[level].sum()
        return self.feature_weight * total / cells

    def _prior(
        self,
        student: Outputs,
        shown: Outputs,
        objects: Objects,
        owner: Tensor,
    ) -> Tensor:
        check_form('DETRDistillTerm', 'prior_weight', student, shown)
        asked = {key: value.detach() for key, value in question(shown).items()}
        found = ask(student, asked)
        head = getattr(student.detector, HEAD)
        return self.prior_weight * sum(
            assigned_loss(head, *layer, objects)
            for layer in zip(found.logits, found.boxes, owner)
        )


def by_layer(values: Tensor, there: Tensor) -> Tensor:
    """Mean of those that are there, of each layer, added over layers.

    Args:
        values, there: (L, N, P) each.
    """
    total = (values * there).sum((1, 2))
    return (total / there.sum((1, 2)).clamp(min=1)).sum()


@torch.no_grad()
def query_quality(found: Answers, objects: Objects, gamma: float) -> Tensor:
    r"""How well each query of the last layer fits an object.

    .. math:: \max_g c_g^{\gamma} \, IoU(b, b_g)^{1 - \gamma}

    Args:
        found: What the layers say.
        objects: M an image.
        gamma: Share of the class.

    Returns:
        (N, Q), 0 in images without objects.
    """
    chance, boxes = found.chances[-1], found.boxes[-1]
    labels = objects.labels[:, None].expand(*chance.shape[:2], -1)
    classes = chance.gather(-1, labels)
    fit = iou(corners(boxes)[:, :, None], corners(objects.boxes)[:, None])
    quality = classes**gamma * fit ** (1 - gamma)
    return (quality * objects.there[:, None]).amax(-1)


@torch.no_grad()
def target_mask(feature: Tensor, queries: Tensor, quality: Tensor) -> Tensor:
    r"""Where queries of quality look, in [0, 1].

    .. math:: \frac{\sum_i q_i \cos(s_i, F(x))^2}{\sum_i q_i}

    Args:
        feature: Map of one level, (N, D, h, w).
        queries: States, (N, Q, D).
        quality: (N, Q).

    Returns:
        (N, 1, h, w), 0 where no query has quality.

    Example:
        >>> feature = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
        >>> queries = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
        >>> target_mask(feature, queries, torch.tensor([[3.0, 1.0]]))
        tensor([[[[0.7500, 0.2500]]]])
    """
    cells = unit(feature.flatten(2), 1)  # N, D, S
    alike = (unit(queries, -1) @ cells).square()
    total = quality.sum(1, keepdim=True)
    share = quality / torch.where(total > 0, total, 1.0)
    mask = share[:, None] @ alike
    return mask.unflatten(-1, feature.shape[-2:])


def assigned_loss(
    head: nn.Module,
    logits: Tensor,
    boxes: Tensor,
    owner: Tensor,
    objects: Objects,
) -> Tensor:
    """A head's own losses of one layer, with the objects given beforehand.

    Args:
        head: Of DETR's kind.
        logits: (N, Q, C).
        boxes: Centre x, y, width, height, of the image 1, (N, Q, 4).
        owner: Place of the object of each query, -1 for none, (N, Q).
        objects: M an image.
    """
    logits, boxes = as_float(logits), as_float(boxes)
    positive = owner >= 0
    place = owner.clamp(min=0)
    labels = objects.labels.gather(1, place)
    labels = labels.where(positive, labels.new_full((), head.num_classes))
    targets = pick_queries(objects.boxes, place)
    weight = positive[..., None].expand_as(boxes).to(boxes)
    own, like = (corners(one).flatten(0, 1) for one in (boxes, targets))
    count = positive.sum()
    rest = positive.numel() - count
    said: Tensor | tuple[Tensor, Tensor] = labels.flatten()
    if isinstance(head.loss_cls, QualityFocalLoss):
        said = said, iou(own.detach(), like)  # of positives alone
    with full_precision(logits):
        classes = head.loss_cls(
            logits.flatten(0, 1),
            said,
            logits.new_ones(positive.numel()),
            avg_factor=(count + rest * head.bg_cls_weight).clamp(min=1),
        )
        count = count.clamp(min=1)
        l1 = head.loss_bbox(
            boxes.flatten(0, 1),
            targets.flatten(0, 1),
            weight.flatten(0, 1),
            avg_factor=count,
        )
        area = head.loss_iou(own, like, weight.flatten(0, 1), avg_factor=count)
    return classes + l1 + area


def _check_widths(student: Tensor, teacher: Tensor) -> None:
    own, other = student.shape[1], teacher.shape[1]
    if own != other:
        raise ValueError(
            f"DETRDistillTerm compares the encoders' memories, of which the "
            f"student's is {own} wide and the teacher's {other}. Set "
            f'channels=({own}, {other}), or feature_weight=0.'
        )
