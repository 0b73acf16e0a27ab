"""Answers of two detectors, paired with each other and with the truth.

Queries are named by their places in each detector's own order, so that
another order changes nothing that is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmkd.ops.matching import (
    assign,
    pairwise_box_cost,
    pairwise_class_divergence,
    pairwise_label_cost,
)
from mmkd.ops.numeric import as_float
from mmkd.structures import GroundTruth, Outputs
from mmkd.structures.constants import constant
from mmkd.taps import maps_of
from mmkd.terms.queries import DECODER, ENCODER, Answers, question

#: Taken off the cost of queries that must find a partner.
FIRST = 1e6


@dataclass(frozen=True)
class Objects:
    """The annotations of a batch, image by image, as queries answer.

    Attributes:
        boxes: Centre x, y, width, height, of the image 1, (N, M, 4).
        labels: (N, M).
        there: Whether an image has so many, (N, M).
    """

    boxes: Tensor
    labels: Tensor
    there: Tensor

    @classmethod
    def of(cls, gt: GroundTruth) -> Objects:
        """Lay a batch's annotations out.

        Example:
            >>> gt = GroundTruth.from_boxes(
            ...     [torch.tensor([[0.0, 0, 8, 4]])], shape=(16, 16)
            ... )
            >>> Objects.of(gt).boxes.tolist()
            [[[0.25, 0.125, 0.5, 0.25]]]
        """
        low, high = gt.boxes.split(2, -1)
        sizes = gt.image_sizes[gt.image]
        boxes = torch.cat([(low + high) / 2 / sizes, (high - low) / sizes], -1)
        return cls(
            boxes=gt.spread(boxes),
            labels=gt.spread(gt.labels),
            there=gt.spread(torch.ones_like(gt.labels, dtype=torch.bool)),
        )


def of_layers(found: Answers, layers: Sequence[int]) -> Answers:
    """What some layers answer, one for each that is named."""
    index = constant(layers, found.boxes, torch.long)
    return replace(
        found,
        logits=found.logits[index],
        boxes=found.boxes[index],
        states=found.states[index],
    )


def class_logits(
    student: Answers, teacher: Answers, least: float = 1e-6
) -> tuple[Tensor, Tensor, bool]:
    """Classes of both sides in a form in which they can be compared.

    Where one side has a softmax and the other a sigmoid a class, the chance
    of each class is compared, the background left out.

    Args:
        student, teacher: What both said.
        least: Chance that a class has at least, where chances are compared.

    Returns:
        Logits of the student and of the teacher, (L, N, Q, C), and whether
        the C are classes of one distribution.
    """
    if student.softmax == teacher.softmax:
        return (
            as_float(student.logits),
            as_float(teacher.logits),
            (student.softmax),
        )
    own, other = (
        one.chances.clamp(least, 1 - least).logit()
        if one.softmax
        else as_float(one.logits)
        for one in (student, teacher)
    )
    return own, other, False


@torch.no_grad()
def match_answers(
    student: Answers,
    teacher: Answers,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give each of the teacher's queries one of the student's, by layer.

    The cost is what the two would be taught by: divergence of the classes,
    and both distances of the boxes. Of a copy each query finds itself.

    Args:
        student: Of L layers, Q queries.
        teacher: Of as many layers, P queries.
        class_weight, l1_weight, giou_weight: Of the three parts.
        first: Those of the teacher's that must not be left out if the student
            has fewer queries, (L, N, P).

    Returns:
        The student's query, (L, N, P), and whether there was one left,
        (L, N, P).
    """
    own, other, softmax = class_logits(student, teacher)
    cost = torch.stack(
        [
            class_weight * pairwise_class_divergence(*logits, softmax)
            + pairwise_box_cost(*boxes, l1_weight, giou_weight)
            for logits, boxes in zip(
                zip(own, other), zip(student.boxes, teacher.boxes)
            )
        ]
    )  # L, N, Q, P
    if first is not None and cost.shape[2] < cost.shape[3]:
        cost = cost.double() - FIRST * first[:, :, None]
    return _assigned(cost)


@torch.no_grad()
def queries_of(
    found: Answers,
    objects: Objects,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Which query answers for each object, as DETR and its kind decide.

    Args:
        found: Of L layers.
        objects: M an image.
        l1_weight, giou_weight: Of the distances of boxes. That of classes
            counts twice with a sigmoid a class, once with a softmax, as in
            MMDetection's configs.

    Returns:
        Place of the query, (L, N, M), and whether there is an object and a
        query left for it, (L, N, M).
    """
    cost = object_cost(found, objects, l1_weight, giou_weight)  # L, N, Q, M
    # What is not there costs each query the same, and more than all else.
    absent = ~objects.there[None, :, None]
    query, taken = _assigned(cost.masked_fill(absent, FIRST))
    return query, taken & objects.there


@torch.no_grad()
def match_objects(
    found: Answers,
    objects: Objects,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Tensor:
    """Which object each query answers for: :func:`queries_of`, turned round.

    Returns:
        Place of the object, -1 for background, (L, N, Q).
    """
    query, taken = queries_of(found, objects, l1_weight, giou_weight)
    layers, images, queries, _ = found.boxes.shape
    owner = query.new_full((layers, images, queries + 1), -1)
    place = torch.arange(query.shape[2], device=query.device).expand_as(query)
    owner.scatter_(2, query.where(taken, query.new_full((), queries)), place)
    return owner[..., :queries].contiguous()


def object_cost(
    found: Answers,
    objects: Objects,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Tensor:
    """How badly each query answers for each object, as DETR decides.

    Args:
        found, objects, l1_weight, giou_weight: See :func:`match_objects`.

    Returns:
        (L, N, Q, M), of what is not there without meaning.
    """
    return torch.stack(
        [
            (1 if found.softmax else 2)
            * pairwise_label_cost(logits, objects.labels, found.softmax)
            + pairwise_box_cost(boxes, objects.boxes, l1_weight, giou_weight)
            for logits, boxes in zip(found.logits, found.boxes)
        ]
    )


def _assigned(cost: Tensor) -> tuple[Tensor, Tensor]:
    shape = *cost.shape[:2], cost.shape[3]
    row, found = assign(cost.flatten(0, 1))
    return row.view(shape), found.view(shape)


# The memory that decoders look at --------------------------------------------


def maps_path(detector: nn.Module) -> str:
    """What returns the maps that a detector's memory is made of."""
    return (
        'neck' if getattr(detector, 'neck', None) is not None else 'backbone'
    )


def map_sizes(outputs: Outputs) -> list[tuple[int, int]]:
    """Rows and columns of each level of the memory, the finest first.

    Detectors of one level take the last of the neck's maps.

    Raises:
        ValueError: If the tokens are not those of the neck's maps.
    """
    path = maps_path(outputs.detector)
    maps = maps_of(outputs.at(path), f'The tap {path!r}')
    sizes = [(one.shape[-2], one.shape[-1]) for one in maps]
    tokens = _memory(outputs).shape[1]
    for taken in (sizes, sizes[-1:]):
        if sum(rows * columns for rows, columns in taken) == tokens:
            return taken
    raise ValueError(
        f'{type(outputs.detector).__name__} has a memory of {tokens} tokens, '
        f'but its {path} gives maps of {sizes}. Choose a term on the {path} '
        f"for this pair: type='mmkd.FeatureTerm'."
    )


def memory_maps(outputs: Outputs) -> tuple[Tensor, ...]:
    """The memory as maps, one a level, (N, D, h, w)."""
    return to_maps(_memory(outputs).mT, map_sizes(outputs))


def _memory(outputs: Outputs) -> Tensor:
    """What the encoder says, or what the decoder is given of it, (N, S, D)."""
    if outputs.has(ENCODER):
        return outputs.at(ENCODER)['memory']
    _, given = outputs.inputs(DECODER)
    return given['memory']


def inside_tokens(outputs: Outputs) -> Tensor:
    """1 where the memory is of the image, 0 in its padded border, (N, S)."""
    _, given = outputs.inputs(DECODER)
    memory, border = given['memory'], given.get('memory_mask')
    inside = memory.new_ones(memory.shape[:2], dtype=torch.float32)
    return inside if border is None else inside * ~border.bool()


def inside_maps(outputs: Outputs) -> tuple[Tensor, ...]:
    """The same as maps, (N, 1, h, w) each."""
    return to_maps(inside_tokens(outputs)[:, None], map_sizes(outputs))


def to_maps(
    values: Tensor, sizes: Sequence[tuple[int, int]]
) -> tuple[Tensor, ...]:
    """What is said of all cells of the memory, (…, S), as maps (…, h, w)."""
    parts = values.split([rows * columns for rows, columns in sizes], -1)
    return tuple(part.unflatten(-1, size) for part, size in zip(parts, sizes))


def nearest_map(one: Tensor, maps: Sequence[Tensor]) -> int:
    """Place of the map that is nearest in size."""
    cells = one.shape[-2] * one.shape[-1]
    return min(
        range(len(maps)),
        key=lambda place: abs(
            math.log(cells / math.prod(maps[place].shape[-2:]))
        ),
    )


# Questions -------------------------------------------------------------------


def same_form(student: Outputs, teacher: Outputs) -> bool:
    """Whether one decoder can be asked what the other was."""
    own, other = (
        {key: value.shape[-1] for key, value in question(one).items()}
        for one in (student, teacher)
    )
    return own == other


def check_form(
    who: str, setting: str, student: Outputs, teacher: Outputs
) -> None:
    """Decoders must be of one kind if they are asked the same.

    Raises:
        ValueError: If they are not; the message names the weight to set to 0.
    """
    if same_form(student, teacher):
        return
    own, other = (
        ', '.join(
            f'{key} of {value.shape[-1]}'
            for key, value in question(one).items()
        )
        for one in (student, teacher)
    )
    raise ValueError(
        f"{who} asks the student's decoder the teacher's queries, but the "
        f'student, {type(student.detector).__name__}, takes {own} and the '
        f'teacher, {type(teacher.detector).__name__}, {other}. Set '
        f'{setting}=0 for this pair.'
    )
