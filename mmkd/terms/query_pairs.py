"""Queries of two detectors that belong together, in one order for both.

Query i of one detector has nothing in common with query i of another. Here
they are laid out so that it has: by the objects that they answer for, by what
they answer, or by being asked the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmkd.checks import check_name
from mmkd.ops.matching import assign, pick_queries
from mmkd.ops.numeric import full_precision
from mmkd.ops.regions import jittered_boxes
from mmkd.structures import GroundTruth, Outputs
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import Answers, answers, question
from mmkd.terms.query_matching import (
    FIRST,
    Objects,
    match_answers,
    object_cost,
    of_layers,
)
from mmkd.terms.shared_queries import ask_alike, confidence

#: By what queries of two detectors find each other.
PAIRINGS = ('objects', 'answers', 'questions')


@dataclass(frozen=True)
class Pairs:
    """Answers of which each belongs to that of the same place.

    Attributes:
        student, teacher: A rows of B queries each, so that ``states`` are
            (L, A, B, D); layers and widths are each side's own. No gradient
            reaches the teacher.
        labels: The class of the object of each row, (A,); None where rows
            are images.
    """

    student: Answers
    teacher: Answers
    labels: Tensor | None = None

    def by_layer(self) -> Pairs:
        """With a layer of the teacher for each of the student's.

        They are paired evenly, the last with the last.
        """
        layers = uniform_map(
            len(self.student.states), len(self.teacher.states)
        )
        return replace(self, teacher=of_layers(self.teacher, layers))


def pair_queries(
    pairing: str,
    student: Outputs,
    teacher: Outputs,
    gt: GroundTruth | None = None,
    views: int = 0,
    jitter: float = 0.15,
) -> Pairs:
    """Lay the queries of two detectors out in one order.

    - ``'objects'``: a row is an object of the batch. Its first query is the
      one that answers for it in the last layer, in DETR's own matching; its
      ``views`` others answer for boxes beside it, among the queries that are
      left. See :func:`object_queries`.
    - ``'answers'``: a row is an image. The answers of the last layers are
      matched with each other, as many as the side with fewer queries has;
      if it is the student's, the teacher's surest are not left out.
    - ``'questions'``: a row is an image. The student's decoder is asked the
      teacher's queries, once more; both must be of one form.

    Other orders of the queries on either side change nothing but the order of
    the pairs.

    Args:
        pairing: One of :data:`PAIRINGS`.
        student, teacher: What both said.
        gt: The objects, for pairs by them.
        views: Queries of an object besides the first.
        jitter: How far the boxes beside an object are moved and stretched, as
            a share of their sides.
    """
    check_name('pair_queries', 'pairing', pairing, PAIRINGS)
    known = answers(teacher).detach()
    if pairing == 'questions':
        return Pairs(ask_alike(student, question(teacher)), known)
    own = answers(student)
    if pairing == 'answers':
        return matched(own, known)
    boxes = jittered_boxes(gt.boxes, gt.image_sizes[gt.image], views, jitter)
    return Pairs(
        *(_of_objects(one, gt, boxes) for one in (own, known)), gt.labels
    )


def matched(student: Answers, teacher: Answers) -> Pairs:
    """Answers of two detectors, paired by what the last layers say."""
    index = matched_queries(student, teacher)
    return Pairs(*map(_picked, (student, teacher), index))


@torch.no_grad()
def matched_queries(
    student: Answers, teacher: Answers
) -> tuple[Tensor, Tensor]:
    """Queries of both sides whose last answers are matched, one to one.

    Args:
        student, teacher: Of Q and P queries.

    Returns:
        Of the student and of the teacher, (N, min(Q, P)) each.
    """
    own, other = (of_layers(one, [-1]) for one in (student, teacher))
    count = min(own.boxes.shape[2], other.boxes.shape[2])
    surest = confidence(other).topk(count).indices
    first = torch.zeros_like(other.boxes[..., 0], dtype=torch.bool)
    first[0].scatter_(1, surest, True)
    with full_precision(own.boxes):
        (row,), (found,) = match_answers(own, other, first=first)
    kept = found.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return row.gather(1, kept), kept


@torch.no_grad()
def object_queries(found: Answers, gt: GroundTruth, boxes: Tensor) -> Tensor:
    """The queries that answer for objects and for boxes beside them.

    Those of the objects are matched as DETR matches them, by class and box of
    the last layer; those of the boxes beside them likewise, with the object's
    class, among the queries that are left. If there are fewer queries than
    boxes, one that none was left for takes the nearest.

    Args:
        found: What the layers say.
        gt: The objects.
        boxes: Each object's own box first, then those beside it, x1 y1 x2 y2
            in pixels, (M, 1 + V, 4).

    Returns:
        Index of the query, (M, 1 + V).
    """
    last = of_layers(found, [-1])
    own, *beside = (
        Objects.of(replace(gt, boxes=one)) for one in boxes.unbind(1)
    )
    with full_precision(last.boxes):
        first = _nearest(object_cost(last, own)[0], own.there)  # N, M
        picked = [first]
        if beside:
            views = Objects(
                *(
                    torch.cat([getattr(one, name) for one in beside], 1)
                    for name in ('boxes', 'labels', 'there')
                )
            )
            cost = object_cost(last, views)[0]  # N, Q, V · M
            taken = torch.zeros_like(cost[..., 0])
            taken.scatter_add_(1, first, own.there.to(cost))
            cost = cost + FIRST * (taken > 0)[..., None]
            picked += _nearest(cost, views.there).chunk(len(beside), 1)
    return torch.stack([one[gt.image, gt.place] for one in picked], 1)


def _nearest(cost: Tensor, there: Tensor) -> Tensor:
    """A query for each of the objects that are there, (N, Q, M) → (N, M)."""
    row, found = assign(cost.masked_fill(~there[:, None], 2 * FIRST))
    return torch.where(found, row, cost.argmin(1))


def _picked(found: Answers, index: Tensor) -> Answers:
    """Some of the queries of each image, (N, B) → (L, N, B, …)."""
    return replace(
        found,
        logits=pick_queries(found.logits, index),
        boxes=pick_queries(found.boxes, index),
        states=pick_queries(found.states, index),
    )


def _of_objects(found: Answers, gt: GroundTruth, boxes: Tensor) -> Answers:
    """What is said of each object, (L, M, B, …)."""
    index, image = object_queries(found, gt, boxes), gt.image[:, None]
    return replace(
        found,
        logits=found.logits[:, image, index],
        boxes=found.boxes[:, image, index],
        states=found.states[:, image, index],
    )
