"""D³ETR: decoders compared by what they say and by where they look."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models.layers.transformer.utils import ConditionalAttention
from torch import Tensor, nn

from mmkd.losses.attention_divergence import attention_divergence
from mmkd.losses.query import query_box_errors, query_class_divergence
from mmkd.ops.matching import pick_queries
from mmkd.ops.numeric import as_float, full_precision
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.structures.constants import constant
from mmkd.taps import crop, recording
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import (
    Answers,
    answers,
    ask,
    bind_queries,
    own_queries,
    question,
)
from mmkd.terms.query_matching import (
    check_form,
    class_logits,
    map_sizes,
    maps_path,
    match_answers,
    of_layers,
    to_maps,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

#: Of a decoder's layer: who looks at other queries, who at the memory.
SELF, CROSS = 'self_attn', 'cross_attn'


@MODELS.register_module()
class D3ETRTerm(Term):
    r"""Predictions and attention maps of decoders, under two matchings.

    **Adaptive.** In every layer each of the teacher's queries is given one of
    the student's, one to one, so that predictions are as near as can be.

    **Fixed.** The student's decoder is asked the teacher's queries, in a pass
    of their own, and query i answers for query i.

    Student's layer n learns from layer m(n) of the teacher. For each matching
    pairs (s, t) of queries have three shares, each a mean by layer that is
    added over layers:

    .. math::
        prediction &= 2 \, D(p_s, p_t) + w_t \left( 5 \lVert b_s - b_t \rVert_1
            + 2 (1 - GIoU(b_s, b_t)) \right) \\
        self &= KL(A^T_{t \cdot} \Vert A^S_{s \cdot}) \qquad
        cross = KL(C^T_{t \cdot} \Vert C^S_{s \cdot})

    D is the divergence of classes, w the teacher's highest chance of a class;
    boxes are averaged by it. A are the maps of self-attention, heads averaged,
    whose rows and columns are both put in the order of the pairs; what has no
    partner, denoising queries too, is left out, and the rows brought to a sum
    of 1. C are those of cross-attention over the memory; a teacher's that is
    of another size is resized and brought to a sum of 1.

    With ``prediction_weight=0`` it is a term of attention maps alone.

    Args:
        teacher: Name of the teacher.
        adaptive_weight, fixed_weight: Of the two matchings. The fixed one
            needs decoders that are asked in one form; 0 for others.
        prediction_weight: Of predictions.
        self_weight: Of the maps of self-attention.
        cross_weight: Of those of cross-attention. Deformable attention has no
            map; 0 for detectors that have it.
        class_weight, l1_weight, giou_weight: Of classes and boxes, in the
            matching and in what is learnt by it. Those of DETR's kind.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``adaptive_prediction``, ``adaptive_self``, ``adaptive_cross``, and
        ``fixed_…`` likewise, as far as they have a weight.

    Raises:
        ValueError: If one side has no queries, an attention has no map, or
            the queries are not of one form, while the model is built.

    Reference:
        Chen et al., "D³ETR: Decoder Distillation for Detection Transformer",
        IJCAI 2024, arXiv:2211.09768. Read: the abstract and a summary; no
        code. Ours: all weights, the divergences, the divergence in the
        matching, and that boxes count as the teacher is sure of them.
    """

    def __init__(
        self,
        teacher: str,
        adaptive_weight: float = 1.0,
        fixed_weight: float = 1.0,
        prediction_weight: float = 1.0,
        self_weight: float = 1.0,
        cross_weight: float = 1.0,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        self.teacher = teacher
        self.adaptive_weight, self.fixed_weight = adaptive_weight, fixed_weight
        self.prediction_weight = prediction_weight
        self.self_weight, self.cross_weight = self_weight, cross_weight
        self.class_weight = class_weight
        self.l1_weight, self.giou_weight = l1_weight, giou_weight

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        teacher = bind_queries(self, student, teachers, self.teacher)
        sides = (
            (student, 'student', lambda path: self.tap(student, path)),
            (teacher.detector, 'teacher', teacher.tap),
        )
        for detector, side, tap in sides:
            for kind in self._kinds():
                check_maps(detector, side, kind)
                for path in attention_paths(detector, kind):
                    tap(path)
            if self.cross_weight:
                tap(maps_path(detector))

    def silent(self) -> bool:
        matchings = self.adaptive_weight, self.fixed_weight
        parts = self.prediction_weight, self.self_weight, self.cross_weight
        return not (any(matchings) and any(parts))

    def compares_classes(self) -> bool:
        return True

    def _kinds(self) -> list[str]:
        weights = {SELF: self.self_weight, CROSS: self.cross_weight}
        return [kind for kind, weight in weights.items() if weight]

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        own, other = answers(step.student), answers(shown).detach()
        layers = uniform_map(len(own.boxes), len(other.boxes))
        other = of_layers(other, layers)
        places = constant(layers, other.boxes, torch.long)
        targets = {
            kind: attention_maps(shown, kind)[places].detach()
            for kind in self._kinds()
        }
        if CROSS in targets:
            targets[CROSS] = _like_memory(targets[CROSS], step, shown)
        parts = {}
        if self.adaptive_weight:
            maps = {
                kind: attention_maps(step.student, kind)
                for kind in self._kinds()
            }
            with full_precision(own.boxes):
                index, found = match_answers(
                    own,
                    other,
                    self.class_weight,
                    self.l1_weight,
                    self.giou_weight,
                    first=most_certain(other, own.boxes.shape[2]),
                )
                shares = self._shares(own, other, maps, targets, index, found)
            parts |= {
                f'adaptive_{part}': self.adaptive_weight * share
                for part, share in shares.items()
            }
        if self.fixed_weight:
            shares = self._fixed(step.student, shown, other, targets)
            parts |= {
                f'fixed_{part}': self.fixed_weight * share
                for part, share in shares.items()
            }
        return parts

    def _fixed(
        self,
        student: Outputs,
        shown: Outputs,
        other: Answers,
        targets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        check_form('D3ETRTerm', 'fixed_weight', student, shown)
        asked = {key: value.detach() for key, value in question(shown).items()}
        detector = student.detector
        paths = {
            kind: attention_paths(detector, kind) for kind in self._kinds()
        }
        with recording(detector, chain(*paths.values())) as record:
            found = ask(student, asked)
        maps = {
            kind: torch.stack([record.at(path)[1] for path in some])
            for kind, some in paths.items()
        }
        shape = other.boxes.shape[:3]
        index = torch.arange(shape[-1], device=other.boxes.device)
        with full_precision(found.boxes):
            return self._shares(
                found,
                other,
                maps,
                targets,
                index.expand(shape),
                torch.ones(shape, dtype=torch.bool, device=index.device),
            )

    def _shares(
        self,
        own: Answers,
        other: Answers,
        maps: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        index: Tensor,
        found: Tensor,
    ) -> dict[str, Tensor]:
        """What is learnt where the student's query ``index`` is a partner."""
        shares = {}
        if self.prediction_weight:
            shares['prediction'] = self.prediction_weight * self._prediction(
                own, other, index, found
            )
        if SELF in maps:
            divergence = attention_divergence(
                pick_both(maps[SELF], index), targets[SELF], found, found
            )
            shares['self'] = self.self_weight * divergence
        if CROSS in maps:
            divergence = attention_divergence(
                pick_queries(maps[CROSS], index), targets[CROSS], found
            )
            shares['cross'] = self.cross_weight * divergence
        return shares

    def _prediction(
        self, own: Answers, other: Answers, index: Tensor, found: Tensor
    ) -> Tensor:
        logits, targets, softmax = class_logits(own, other)
        classes = query_class_divergence(
            pick_queries(logits, index), targets, softmax
        )
        l1, error = query_box_errors(
            pick_queries(own.boxes, index), other.boxes
        )
        sure = found * other.chances.amax(-1)
        boxes = self.l1_weight * l1 + self.giou_weight * error
        return self.class_weight * _mean(classes, found) + _mean(boxes, sure)


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of each layer, added over layers."""
    total = weight.sum((1, 2))
    share = (values * weight).sum((1, 2))
    return (share / torch.where(total > 0, total, 1.0)).sum()


def most_certain(found: Answers, count: int) -> Tensor:
    """The queries that are surest of a class, as many as are asked for.

    Returns:
        (L, N, Q).
    """
    sure = found.chances.amax(-1)
    top = sure.topk(min(count, sure.shape[-1]), -1).indices
    none = torch.zeros_like(sure, dtype=torch.bool)
    return none.scatter(-1, top, True)


def pick_both(maps: Tensor, index: Tensor) -> Tensor:
    """Rows and columns that an index names, by layer and image.

    Args:
        maps: (L, N, Q, Q).
        index: (L, N, P).

    Returns:
        (L, N, P, P).

    Example:
        >>> maps = torch.arange(4.0).view(1, 1, 2, 2)
        >>> pick_both(maps, torch.tensor([[[1, 0]]])).view(2, 2)
        tensor([[3., 2.],
                [1., 0.]])
    """
    rows = pick_queries(maps, index)
    return pick_queries(rows.mT, index).mT


# Where a decoder looks -------------------------------------------------------


def attention_paths(detector: nn.Module, kind: str) -> list[str]:
    """What returns the maps of each layer; none where there are none."""
    paths = []
    for place, layer in enumerate(detector.decoder.layers):
        attention, path = (
            getattr(layer, kind),
            f'decoder.layers.{place}.{kind}',
        )
        if isinstance(attention, ConditionalAttention):
            paths.append(f'{path}.forward_attn')
        elif isinstance(attention, MultiheadAttention):
            paths.append(f'{path}.attn')
    return paths


def has_maps(detector: nn.Module, kind: str) -> bool:
    """Whether every layer of a decoder has a map."""
    paths = attention_paths(detector, kind)
    return len(paths) == len(detector.decoder.layers)


def check_maps(detector: nn.Module, side: str, kind: str) -> None:
    """Every layer of a decoder must have maps.

    Raises:
        ValueError: If not; the message names the weight to set to 0.
    """
    if has_maps(detector, kind):
        return
    layers = detector.decoder.layers
    raise ValueError(
        f'D3ETRTerm compares the maps of {kind} in decoders, but that of the '
        f'{side}, {type(detector).__name__}, is a '
        f'{type(getattr(layers[0], kind)).__name__}, which looks at a few '
        f'points and has no map. Set {kind.removesuffix("_attn")}_weight=0 '
        f'for this pair.'
    )


def attention_maps(outputs: Outputs, kind: str) -> Tensor:
    """Where a detector's own queries look, heads averaged.

    Returns:
        (L, N, Q, Q) of self-attention, (L, N, Q, S) of cross-attention.
    """
    detector = outputs.detector
    maps = torch.stack(
        [outputs.at(path)[1] for path in attention_paths(detector, kind)]
    )
    own = own_queries(detector, maps.shape[2])
    return maps[:, :, own, own] if kind == SELF else maps[:, :, own]


def _like_memory(maps: Tensor, step: Step, shown: Outputs) -> Tensor:
    """The teacher's maps over the cells of the student's memory."""
    (own,), (other,) = map_sizes(step.student), map_sizes(shown)
    (found,) = crop(
        to_maps(as_float(maps), [other]), shown.size, step.images.shape[-2:]
    )
    if found.shape[-2:] != own:
        resized = F.interpolate(found.flatten(0, 1), own, mode='bilinear')
        found = resized.unflatten(0, found.shape[:2])
    return found.flatten(-2)
