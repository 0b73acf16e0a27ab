"""CLoCKDistill: the memory where objects are, and queries that look there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_positive
from mmkd.ops.matching import assign, pairwise_box_cost
from mmkd.ops.numeric import as_float, one_hot
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Outputs, Step
from mmkd.terms.memory_maps import MemoryTerm
from mmkd.terms.queries import (
    Answers,
    answers,
    ask,
    bind_queries,
    question,
)
from mmkd.terms.query_matching import Objects
from mmkd.terms.shared_queries import answer_distances, ask_alike

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


@MODELS.register_module()
class CLoCKTerm(MemoryTerm):
    r"""Memories compared in objects and beside them, and queries of objects.

    .. math::
        \frac{1}{N} \sum_l \sum_{i, c}
            (\alpha M_{li} + \beta B_{li}) (S_{lic} - T_{lic})^2
        + \sum_l \frac{1}{|G|} \sum_{q \in G} \left(
            \lambda_{cls} D(p^T_{lq}, p^S_{lq})
            + \lambda_{l1} \lVert b^T_{lq} - b^S_{lq} \rVert_1
            + \lambda_{giou} (1 - GIoU(b^T_{lq}, b^S_{lq})) \right)

    S and T are what the encoders of student and teacher hand their decoders,
    and N the images. M is one over a box's cells inside of it, B one over the
    number of cells beside all boxes, as in FGD; the padded border is in
    neither.

    Both decoders are then asked the teacher's queries, of which those count
    that belong to an object, G: each box is given the query whose answer fits
    it best, one to one. Where the decoder takes queries with a box (DAB-DETR,
    two-stage Deformable DETR, DINO, DDQ) that query is moved to the true box,
    and takes the embedding of the true class where the teacher has learnt
    one for its denoising (DINO, DDQ). Other queries (DETR, Conditional and
    one-stage Deformable DETR) have no box that could be set, and stay as they
    are. So no image needs padding by queries that others would attend to, and
    nothing depends on what else is in the batch.

    Args:
        teacher: Name of the teacher.
        foreground_weight, background_weight: The two parts of the memory,
            :math:`\alpha` and :math:`\beta`.
        cls_weight, l1_weight, giou_weight: Of the queries, DETR's by default;
            all 0 to compare memories alone, which decoders of any two forms
            and widths can.
        temperature: Divides class logits.
        levels, teacher_levels, align, teacher_align: See :class:`MemoryTerm`.
        max_objects: Boxes of an image that queries are found for.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``foreground``, ``background``, and, with queries, ``cls``, ``l1`` and
        ``giou``.

    Raises:
        ValueError: If a detector has no queries, memories or queries do not
            fit, while the model is built.

    Reference:
        Lan & Tian, "CLoCKDistill: Consistent Location-and-Context-aware
        Knowledge Distillation for DETRs", arXiv:2502.10683. Read: a summary;
        no code. Ours: the weights of the memory's parts, that boxes replace
        the teacher's best queries, and what is done for queries without box.
    """

    def __init__(
        self,
        teacher: str,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        cls_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        temperature: float = 1.0,
        levels: Sequence[int] | None = None,
        align: Mapping | None = None,
        teacher_levels: Sequence[int] | None = None,
        teacher_align: Mapping | None = None,
        max_objects: int = 100,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(
            teacher,
            dict(
                type='mmkd.CLoCKMemoryLoss',
                foreground_weight=foreground_weight,
                background_weight=background_weight,
            ),
            levels=levels,
            align=align,
            teacher_levels=teacher_levels,
            teacher_align=teacher_align,
            schedule=schedule,
        )
        check_positive(
            'CLoCKTerm', temperature=temperature, max_objects=max_objects
        )
        self.places = foreground_weight, background_weight
        self.weights = cls_weight, l1_weight, giou_weight
        self.temperature, self.max_objects = temperature, max_objects

    @property
    def queries(self) -> bool:
        """Whether queries are compared at all."""
        return any(self.weights)

    def silent(self) -> bool:
        return not (self.queries or any(self.places))

    def compares_classes(self) -> bool:
        return self.queries

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        super().bind(student, teachers)
        if self.queries:
            bind_queries(self, student, teachers, self.teacher)

    def forward(self, step: Step) -> dict[str, Tensor]:
        parts = super().forward(step)
        if not self.queries:
            return parts
        teacher = step.teacher(self.teacher)
        with torch.no_grad():
            asked, moved, objects = target_queries(
                teacher, step.gt, self.max_objects
            )
            known = ask(teacher, asked) if moved else answers(teacher)
        found = answer_distances(
            ask_alike(step.student, asked), known, objects, self.temperature
        )
        return {
            **parts,
            **{
                part: weight * value
                for weight, (part, value) in zip(self.weights, found.items())
            },
        }


def target_queries(
    outputs: Outputs, gt: GroundTruth, limit: int
) -> tuple[dict[str, Tensor], bool, Tensor]:
    """A detector's own queries, those of objects moved to their boxes.

    Args:
        outputs: Of the detector that is asked.
        gt: The objects.
        limit: Of an image, how many of them at most.

    Returns:
        The questions; whether they differ from the detector's own in any
        place; and 1 for each query of an object, 0 for others, (N, Q).
    """
    own, said = question(outputs), answers(outputs)
    count = said.boxes.shape[2]
    true = Objects.of(gt)
    boxes, labels, real = (
        one[:, : min(limit, count)]
        for one in (true.boxes, true.labels, true.there)
    )
    cost = _cost(said, boxes, labels) * real[:, None]
    row, found = assign(cost)
    # N, objects, queries
    place = one_hot(row, count) * (found * real)[..., None]
    objects = place.sum(1)
    changes = {
        key: torch.einsum('npq,npd->nqd', place, as_float(one))
        for key, one in _at_boxes(outputs.detector, own, boxes, labels).items()
    }
    hit = objects[..., None] > 0
    asked = {
        key: torch.where(hit, changes[key].to(one.dtype), one)
        if key in changes
        else one
        for key, one in own.items()
    }
    return asked, bool(changes), objects


def _cost(said: Answers, boxes: Tensor, labels: Tensor) -> Tensor:
    """Of each query for each object, as DETR matches them, (N, Q, P)."""
    chances = said.chances[-1]
    index = labels[:, None].expand(-1, chances.shape[1], -1)
    return pairwise_box_cost(said.boxes[-1], boxes) - chances.gather(2, index)


def _at_boxes(
    detector: nn.Module,
    own: Mapping[str, Tensor],
    boxes: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """What queries at boxes hold, of those parts that a box decides."""
    places, position = own.get('reference_points'), own.get('query_pos')
    logits = boxes.logit(eps=1e-3)
    if places is None:
        is_box = position.shape[-1] == 4 < own['query'].shape[-1]
        return dict(query_pos=logits) if is_box else {}
    if places.shape[-1] != 4:
        return {}
    found = dict(reference_points=boxes)
    if position is not None:
        embedded = detector.get_proposal_pos_embed(logits.to(places.dtype))
        both = detector.pos_trans_norm(detector.pos_trans_fc(embedded))
        found['query_pos'], found['query'] = both.chunk(2, -1)
    elif hasattr(detector, 'dn_query_generator'):
        found['query'] = detector.dn_query_generator.label_embedding(labels)
    return found
