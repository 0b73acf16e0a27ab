"""MLKD-BERT for detectors of queries: encoders, decoders and objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmkd.checks import check_name, check_positive
from mmkd.losses.query import (
    query_box_errors,
    query_class_divergence,
    weighted_mean,
)
from mmkd.ops.contrast import supervised_contrast
from mmkd.ops.gather import gather_rows
from mmkd.ops.heads import heads_of
from mmkd.ops.masks import valid_mask
from mmkd.ops.matching import assign, pairwise_box_cost, pick_queries
from mmkd.ops.numeric import as_float, full_precision, zero_of
from mmkd.ops.relations import relation_divergence
from mmkd.ops.windows import grid_tokens
from mmkd.registry import MODELS
from mmkd.structures import GroundTruth, Outputs, Step
from mmkd.taps import crop
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import (
    Answers,
    answers,
    bind_queries,
    own_queries,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

PARTS = ('encoder', 'decoder')
#: Maps that become the encoder's tokens.
MAPS = 'neck'


@MODELS.register_module()
class MLKDBertQueryLayersTerm(Term):
    r"""The first stage for encoders and decoders of the DETR family.

    As :class:`mmkd.terms.mlkd_bert.MLKDBertLayersTerm`, whose formulas these
    are: ``emb`` relates the tokens that enter the encoder, ``mha`` the outputs
    of the heads of each self-attention, cut into as many splits as the student
    has heads, and ``ffn`` compares the outputs of layers through a matrix.

    Tokens of an encoder are cells of maps. Each level of the student learns
    from that of the teacher which is nearest in size, both as means over the
    cells of one grid; cells of the padded border count on neither side. Those
    of a decoder are queries: the Hungarian method pairs the last boxes of both
    sides, of which no two detectors need as many, and what is not paired is
    left out. Denoising queries are, too. In attention that goes to a few
    points, and in that of ``nn.MultiheadAttention``, heads are read alike,
    before they are mixed.

    Args:
        teacher: Name of the teacher.
        student_channels, teacher_channels: Of the tokens of either side.
        parts: ``'encoder'``, ``'decoder'`` or both.
        layer_map: ``'uniform'``, the one there is: see
            :func:`mmkd.terms.mlkd_bert.uniform_map`.
        splits: ``'student'``, or their number.
        grid: Rows and columns of the grid, at most, of each level.
        l1_weight, giou_weight: Of the distances by which queries are paired.
        emb_weight, mha_weight, ffn_weight: Of each part of the loss.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``mha`` and ``ffn``, with the encoder ``emb``.

    Raises:
        ValueError: If a side has no queries, channels or splits do not fit, a
            decoder changes its queries from layer to layer, or the teacher
            has a cache, while the model is built.

    Reference:
        Zhang et al., "MLKD-BERT: Multi-level Knowledge Distillation for
        Pre-trained Language Models", arXiv:2407.02775. Read: a summary; no
        code is known. Ours: all that concerns maps, grids, levels and
        queries, one matrix for each part, and a sum over layers.
    """

    def __init__(
        self,
        teacher: str,
        student_channels: int,
        teacher_channels: int,
        parts: Sequence[str] = PARTS,
        layer_map: str = 'uniform',
        splits: str | int = 'student',
        grid: Sequence[int] = (16, 16),
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        emb_weight: float = 1.0,
        mha_weight: float = 1.0,
        ffn_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        who = 'MLKDBertQueryLayersTerm'
        self.teacher = teacher
        self.channels = student_channels, teacher_channels
        self.parts = (parts,) if isinstance(parts, str) else tuple(parts)
        for part in self.parts:
            check_name(who, 'part', part, PARTS)
        check_name(who, 'layer_map', layer_map, ['uniform'])
        if isinstance(splits, str):
            check_name(who, 'splits', splits, ['student'])
        else:
            check_positive(who, splits=splits)
        self.splits = splits
        rows, columns = grid
        check_positive(who, rows=rows, columns=columns)
        self.grid = rows, columns
        self.costs = dict(l1_weight=l1_weight, giou_weight=giou_weight)
        self.emb_weight = emb_weight
        self.mha_weight, self.ffn_weight = mha_weight, ffn_weight
        self.projections = nn.ModuleDict(
            {
                part: nn.Linear(*self.channels, bias=False)
                for part in self.parts
            }
        )

    def silent(self) -> bool:
        return not (self.emb_weight or self.mha_weight or self.ffn_weight)

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        teacher = bind_queries(self, student, teachers, self.teacher)
        sides = (
            (student, 'student', lambda path: self.tap(student, path)),
            (teacher.detector, 'teacher', teacher.tap),
        )
        for (detector, side, tap), width in zip(sides, self.channels):
            self._check(student, detector, side, width)
            if 'encoder' in self.parts:
                tap(MAPS)
            for part in self.parts:
                for index in range(len(detector.get_submodule(part).layers)):
                    layer = f'{part}.layers.{index}'
                    tap(_heads_at(detector, layer))
                    if part == 'encoder':
                        tap(layer)

    def _check(
        self, student: nn.Module, detector: nn.Module, side: str, width: int
    ) -> None:
        name = type(detector).__name__
        if 'decoder' in self.parts and hasattr(detector, 'cache_dict'):
            raise ValueError(
                f'MLKDBertQueryLayersTerm follows queries through layers, '
                f"but each layer of the {side}'s decoder, {name}, goes on "
                f"with others. Set parts=('encoder',)."
            )
        for part in self.parts:
            found = detector.get_submodule(part).embed_dims
            if found != width:
                raise ValueError(
                    f'MLKDBertQueryLayersTerm was built for tokens of {width} '
                    f"channels, but the {side}'s {part}, of {name}, has "
                    f'{found}. Set {side}_channels={found}.'
                )
            splits = self._splits(student, part)
            if width % splits:
                raise ValueError(
                    f'MLKDBertQueryLayersTerm cuts {width} channels of the '
                    f"{side}'s {part} into {splits} splits of one width, "
                    f'which leaves a rest. Set splits= to a number that '
                    f'divides the channels of both sides.'
                )

    def _splits(self, student: nn.Module, part: str) -> int:
        if self.splits != 'student':
            return self.splits
        return student.get_submodule(part).layers[0].self_attn.num_heads

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        sides = step.student, shown
        heard, left, shares = [], [], {}
        if 'encoder' in self.parts:
            heights = step.images.shape[-2], shown.size[0]
            levels = _levels(sides, heights)
            emb = sum(
                relation_divergence(*self._pooled(step, shown, *pair))
                for pair in _paired(*(_maps(one) for one in sides), levels)
            )
            shares['emb'] = self.emb_weight * emb
            for own, other in self._layers(*sides, 'encoder'):
                layers = own, other
                for pair in _paired(*map(_heads_map, sides, layers), levels):
                    tokens = self._pooled(step, shown, *pair)
                    heard.append(self._related('encoder', sides, *tokens))
                for pair in _paired(*map(_output_map, sides, layers), levels):
                    tokens = self._pooled(step, shown, *pair)
                    left.append(self._projected('encoder', *tokens))
        if 'decoder' in self.parts:
            said, heeded = answers(step.student), answers(shown).detach()
            rows, there = assign(
                pairwise_box_cost(
                    said.boxes[-1], heeded.boxes[-1], **self.costs
                )
            )
            for own, other in self._layers(*sides, 'decoder'):
                both = []
                for one, path in zip(sides, (own, other)):
                    tokens = _heads(one, _heads_at(one.detector, path))
                    queries = own_queries(one, tokens.shape[1])
                    both.append(tokens[:, queries])
                tokens = pick_queries(both[0], rows), both[1].detach()
                heard.append(self._related('decoder', sides, *tokens, there))
                index = [int(path.rpartition('.')[2]) for path in (own, other)]
                left.append(
                    self._projected(
                        'decoder',
                        pick_queries(said.states[index[0]], rows),
                        heeded.states[index[1]],
                        there,
                    )
                )
        shares['mha'] = self.mha_weight * sum(heard)
        shares['ffn'] = self.ffn_weight * sum(left)
        return shares

    def _layers(
        self, student: Outputs, shown: Outputs, part: str
    ) -> list[tuple[str, str]]:
        """Paths of the layers of either side that belong together."""
        counts = [
            len(one.detector.get_submodule(part).layers)
            for one in (student, shown)
        ]
        return [
            (f'{part}.layers.{own}', f'{part}.layers.{other}')
            for own, other in enumerate(uniform_map(*counts))
        ]

    def _pooled(
        self, step: Step, shown: Outputs, own: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of one grid, and which are there."""
        (other,) = crop((other.detach(),), shown.size, step.images.shape[-2:])
        grid = tuple(
            min(cells)
            for cells in zip(own.shape[-2:], other.shape[-2:], self.grid)
        )
        (tokens, there), (like, also) = (
            grid_tokens(
                one,
                valid_mask(step.gt, tuple(one.shape[-2:]), keep_ignored=True),
                grid,
            )
            for one in (own, other)
        )
        return tokens, like, there & also

    def _related(
        self,
        part: str,
        sides: tuple[Outputs, Outputs],
        own: Tensor,
        other: Tensor,
        there: Tensor,
    ) -> Tensor:
        splits = self._splits(sides[0].detector, part)
        own, other = (
            as_float(one).unflatten(2, (splits, -1)).transpose(1, 2)
            for one in (own, other)
        )  # N, A, T, C / A
        return relation_divergence(own, other, there[:, None])

    def _projected(
        self, part: str, own: Tensor, other: Tensor, there: Tensor
    ) -> Tensor:
        with full_precision(own):
            moved = self.projections[part](as_float(own))
        error = (moved - as_float(other)).square().mean(-1)
        return weighted_mean(error, there)


@MODELS.register_module()
class MLKDBertQuerySamplesTerm(Term):
    r"""The second stage for detectors of queries: objects as their queries.

    A sample is an object, of all images and processes, as the state of the
    query that answers for it: on either side the one that the Hungarian
    method gives to it. Query by query ``ss`` and ``sc`` are those of
    :class:`mmkd.losses.mlkd_bert_samples.MLKDBertSampleLoss`, ``kd`` is the
    tempered divergence of classes, and ``box`` DETR's distances of boxes.
    Where one side has a softmax and the other does not, the chances of
    classes are compared one by one.

    Args:
        teacher: Name of the teacher.
        student_channels, teacher_channels: Of the states of either side.
        temperature: Of the classes.
        contrast_temperature: Of ``sc``; ours.
        ss_weight, sc_weight, kd_weight, box_weight: Of each part.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``ss``, ``sc``, ``kd`` and ``box``, all 0 without objects.

    Raises:
        ValueError: If a side has no queries, or states of another width.

    Reference:
        As :class:`MLKDBertQueryLayersTerm`. Ours: objects as samples, the
        matching (DETR's costs, chances in place of the focal cost), the
        boxes, and the matrix of ``sc``.
    """

    def __init__(
        self,
        teacher: str,
        student_channels: int,
        teacher_channels: int,
        temperature: float = 2.0,
        contrast_temperature: float = 0.1,
        ss_weight: float = 1.0,
        sc_weight: float = 1.0,
        kd_weight: float = 1.0,
        box_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        check_positive(
            'MLKDBertQuerySamplesTerm',
            temperature=temperature,
            contrast_temperature=contrast_temperature,
        )
        self.teacher = teacher
        self.channels = student_channels, teacher_channels
        self.temperature = temperature
        self.contrast_temperature = contrast_temperature
        self.weights = dict(
            ss=ss_weight, sc=sc_weight, kd=kd_weight, box=box_weight
        )
        self.projection = nn.Linear(*self.channels, bias=False)

    def silent(self) -> bool:
        return not any(self.weights.values())

    def compares_classes(self) -> bool:
        return True

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        teacher = bind_queries(self, student, teachers, self.teacher)
        for detector, side, width in zip(
            (student, teacher.detector), ('student', 'teacher'), self.channels
        ):
            found = detector.decoder.embed_dims
            if found != width:
                raise ValueError(
                    f'MLKDBertQuerySamplesTerm was built for states of '
                    f'{width} channels, but those of the {side}, '
                    f'{type(detector).__name__}, have {found}. Set '
                    f'{side}_channels={found}.'
                )

    def forward(self, step: Step) -> dict[str, Tensor]:
        gt = step.gt
        shown = step.teacher(self.teacher)
        said, heeded = answers(step.student), answers(shown).detach()
        own, other = (of_objects(one, gt) for one in (said, heeded))
        both = own.found & other.found
        there = both[gt.image, gt.place]
        states = [
            gather_rows(as_float(one.states)[gt.image, gt.place])
            for one in (own, other)
        ]
        labels, kept = gather_rows(gt.labels), gather_rows(there)
        if not len(labels):
            touched = said.logits, said.boxes, said.states
            nothing = sum(map(zero_of, (*touched, self.projection.weight)))
            return dict.fromkeys(self.weights, nothing)
        with full_precision(states[0]):
            pair = torch.cat([self.projection(states[0]), states[1]])
        l1, error = query_box_errors(own.boxes, other.boxes)
        shares = dict(
            ss=relation_divergence(*states, kept),
            sc=supervised_contrast(
                pair, labels.repeat(2), self.contrast_temperature
            ),
            kd=weighted_mean(self._classes(own, other, said, heeded), both),
            box=weighted_mean(5 * l1 + 2 * error, both),
        )
        return {key: self.weights[key] * one for key, one in shares.items()}

    def _classes(
        self, own: Objects, other: Objects, said: Answers, heeded: Answers
    ) -> Tensor:
        alike = said.softmax == heeded.softmax
        logits = [
            one.logits if alike or not side.softmax else _bernoulli(one.logits)
            for one, side in ((own, said), (other, heeded))
        ]
        return query_class_divergence(
            *logits, alike and said.softmax, self.temperature
        )


@dataclass(frozen=True)
class Objects:
    """What a detector says of each object, image by image.

    Attributes:
        logits, boxes, states: As those of Answers, (N, most, …).
        found: Whether there is an object that has a query, (N, most).
    """

    logits: Tensor
    boxes: Tensor
    states: Tensor
    found: Tensor


def of_objects(
    given: Answers,
    gt: GroundTruth,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Objects:
    """The last answers of the queries that answer for the objects.

    Args:
        given: Of one detector.
        gt: The objects.
        class_weight, l1_weight, giou_weight: Of the three costs.
    """
    sizes = gt.image_sizes[gt.image].to(gt.boxes)
    corner = gt.boxes / sizes.repeat(1, 2)
    low, high = corner.split(2, -1)
    boxes = gt.spread(torch.cat([(low + high) / 2, high - low], -1))
    there = gt.spread(torch.ones_like(gt.labels)).bool()
    labels = gt.spread(gt.labels)[:, None]
    chances = given.chances[-1]
    chance = chances.gather(
        2, labels.expand(-1, chances.shape[1], -1).clamp(min=0)
    )
    cost = pairwise_box_cost(given.boxes[-1], boxes, l1_weight, giou_weight)
    cost = (cost - class_weight * chance).masked_fill(~there[:, None], 0)
    rows, found = assign(cost)
    return Objects(
        *(
            pick_queries(one[-1], rows)
            for one in (given.logits, given.boxes, given.states)
        ),
        found & there,
    )


def _bernoulli(logits: Tensor) -> Tensor:
    """Logits, with a background → of each class by itself."""
    return as_float(logits).softmax(-1)[..., :-1].logit(eps=1e-6)


def _heads_at(detector: nn.Module, layer: str) -> str:
    """Where the outputs of the heads of a layer's self-attention are."""
    path = f'{layer}.self_attn'
    attention = detector.get_submodule(path)
    if hasattr(attention, 'output_proj'):  # deformable
        return f'{path}.output_proj'
    if hasattr(attention, 'out_proj'):  # conditional
        return f'{path}.out_proj'
    return f'{path}.attn'


def _heads(outputs: Outputs, path: str) -> Tensor:
    """Outputs of all heads, one beside the other, (N, T, C)."""
    args, given = outputs.inputs(path)
    module = outputs.detector.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        return heads_of(module, args, given)[0]
    return args[0]


def _heads_map(outputs: Outputs, layer: str) -> list[Tensor]:
    tokens = _heads(outputs, _heads_at(outputs.detector, layer))
    return _split(tokens, _maps(outputs))


def _output_map(outputs: Outputs, layer: str) -> list[Tensor]:
    return _split(outputs.at(layer), _maps(outputs))


def _maps(outputs: Outputs) -> Sequence[Tensor]:
    return tuple(outputs.at(MAPS))


def _split(tokens: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Tokens of all levels, (N, T, C) → maps, (N, C, H, W) each."""
    sizes = [tuple(one.shape[-2:]) for one in maps]
    parts = tokens.split([rows * columns for rows, columns in sizes], 1)
    return [
        part.transpose(1, 2).unflatten(2, size)
        for part, size in zip(parts, sizes)
    ]


def _levels(
    sides: tuple[Outputs, Outputs], heights: tuple[int, int]
) -> list[int]:
    """Of each of the student's levels, the teacher's of nearest stride."""
    own, other = (
        [math.log(one.shape[-2] / height) for one in _maps(side)]
        for side, height in zip(sides, heights)
    )
    return [
        min(range(len(other)), key=lambda index: abs(other[index] - size))
        for size in own
    ]


def _paired(
    own: Sequence[Tensor], other: Sequence[Tensor], levels: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    return [(one, other[level]) for one, level in zip(own, levels)]
