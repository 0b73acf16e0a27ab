"""MLKD-BERT for detectors of queries: encoders, decoders and objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from mmkd.structures.constants import constant
from mmkd.taps import crop, maps_of
from mmkd.terms.mlkd_bert import uniform_map
from mmkd.terms.queries import answers, bind_queries, own_queries
from mmkd.terms.query_matching import (
    Objects,
    class_logits,
    map_sizes,
    maps_path,
    nearest_map,
    of_layers,
    queries_of,
    to_maps,
)
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher

PARTS = ('encoder', 'decoder')
#: The same tokens of student and teacher, (N, T, C) each, and whether they
#: are there, (N, T).
Tokens = tuple[Tensor, Tensor, Tensor]


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
    sides, and what is not paired is left out. Denoising queries are, too. In
    attention that goes to a few points, and in that of
    ``nn.MultiheadAttention``, heads are read alike, before they are mixed.

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
        grid: tuple[int, int] = (16, 16),
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
            for part in self.parts:
                for layer in _layers(detector, part):
                    tap(_heads_at(detector, layer))
                    if part == 'encoder':
                        tap(layer)
            if 'encoder' in self.parts:
                tap(maps_path(detector))

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
        sides = step.student, step.teacher(self.teacher)
        mha, ffn, shares = [], [], {}
        for part in self.parts:
            said = getattr(self, f'_{part}')(step, *sides)
            splits = self._splits(step.student.detector, part)
            mha += [related(splits, *one) for one in said['mha']]
            ffn += [self._projected(part, *one) for one in said['ffn']]
            if 'emb' in said:
                emb = sum(relation_divergence(*one) for one in said['emb'])
                shares['emb'] = self.emb_weight * emb
        shares['mha'] = self.mha_weight * sum(mha)
        shares['ffn'] = self.ffn_weight * sum(ffn)
        return shares

    def _encoder(
        self, step: Step, student: Outputs, shown: Outputs
    ) -> dict[str, list[Tokens]]:
        sides = student, shown
        own, other = (_layers(one.detector, 'encoder') for one in sides)
        said = dict(emb=self._pooled(step, *map(_entering, sides)))
        said |= dict(mha=[], ffn=[])
        for one, like in enumerate(uniform_map(len(own), len(other))):
            both = list(zip(sides, (own[one], other[like])))
            heads = [_as_maps(side, _heads(side, path)) for side, path in both]
            outputs = [_as_maps(side, side.at(path)) for side, path in both]
            said['mha'] += self._pooled(step, *heads)
            said['ffn'] += self._pooled(step, *outputs)
        return said

    def _decoder(
        self, step: Step, student: Outputs, shown: Outputs
    ) -> dict[str, list[Tokens]]:
        own, other = answers(student), answers(shown).detach()
        index, found = assign(
            pairwise_box_cost(own.boxes[-1], other.boxes[-1], **self.costs)
        )
        layers = constant(
            uniform_map(len(own.states), len(other.states)), index
        )
        heads = zip(_own_heads(student), _own_heads(shown)[layers].detach())
        states = zip(own.states, other.states[layers])
        return {
            part: [(pick_queries(one, index), like, found) for one, like in on]
            for part, on in (('mha', heads), ('ffn', states))
        }

    def _pooled(
        self, step: Step, own: Sequence[Tensor], other: Sequence[Tensor]
    ) -> list[Tokens]:
        """Cells of one grid for each of the student's levels."""
        shown = step.teacher(self.teacher).size
        other = crop(other, shown, step.images.shape[-2:])
        return [
            grid_pair(step.gt, one, other[nearest_map(one, other)], self.grid)
            for one in own
        ]

    def _projected(
        self, part: str, own: Tensor, other: Tensor, there: Tensor
    ) -> Tensor:
        with full_precision(own):
            moved = self.projections[part](as_float(own))
        error = (moved - as_float(other)).square().mean(-1)
        return weighted_mean(error, there)


def related(splits: int, own: Tensor, other: Tensor, there: Tensor) -> Tensor:
    """Divergence of the relations of tokens, split by split.

    Args:
        splits: Into which channels are cut.
        own, other: Tokens of both sides, (N, T, C) and (N, T, C').
        there: Whether they are, (N, T).
    """
    own, other = (
        as_float(one).unflatten(2, (splits, -1)).transpose(1, 2)
        for one in (own, other)
    )  # N, splits, T, C / splits
    return relation_divergence(own, other, there[:, None])


def grid_pair(
    gt: GroundTruth, own: Tensor, other: Tensor, most: tuple[int, int]
) -> Tokens:
    """Means of both maps over the cells of one grid.

    Args:
        gt: Of the batch, which knows its border.
        own, other: Maps, (N, C, h, w), of any two sizes.
        most: Rows and columns of the grid, if the maps have as many.
    """
    sizes = own.shape[-2:], other.shape[-2:]
    grid = tuple(map(min, *sizes, most))
    (tokens, there), (like, also) = (
        grid_tokens(one, valid_mask(gt, size, keep_ignored=True), grid)
        for one, size in zip((own, other.detach()), sizes)
    )
    return tokens, like, there & also


@MODELS.register_module()
class MLKDBertQuerySamplesTerm(Term):
    r"""The second stage for detectors of queries: objects as their queries.

    A sample is an object, of all images and processes, as the state of the
    query that answers for it: on either side the one that DETR's matching
    gives to it. ``ss`` and ``sc`` are those of
    :class:`mmkd.losses.mlkd_bert_samples.MLKDBertSampleLoss`, ``kd`` is the
    tempered divergence of classes, and ``box`` DETR's distances of boxes.
    Where one side has a softmax and the other does not, the chances of
    classes are compared one by one. An object for which a side has no query
    left counts in no part.

    Args:
        teacher: Name of the teacher.
        student_channels, teacher_channels: Of the states of either side.
        temperature: Of the classes.
        contrast_temperature: Of ``sc``; ours.
        l1_weight, giou_weight: Of the distances of boxes, in the matching and
            in ``box``.
        ss_weight, sc_weight, kd_weight, box_weight: Of each part.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``ss``, ``sc``, ``kd`` and ``box``, all 0 without objects.

    Raises:
        ValueError: If a side has no queries, or states of another width.

    Reference:
        As :class:`MLKDBertQueryLayersTerm`. Ours: objects as samples, the
        boxes, and the matrix of ``sc``.
    """

    def __init__(
        self,
        teacher: str,
        student_channels: int,
        teacher_channels: int,
        temperature: float = 2.0,
        contrast_temperature: float = 0.1,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
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
        self.l1_weight, self.giou_weight = l1_weight, giou_weight
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
        labels = gather_rows(gt.labels)
        own, other = (
            of_layers(one, [-1])
            for one in (
                answers(step.student),
                answers(step.teacher(self.teacher)).detach(),
            )
        )
        if not len(labels):
            touched = own.logits, own.boxes, own.states, self.projection.weight
            return dict.fromkeys(self.weights, sum(map(zero_of, touched)))
        objects = Objects.of(gt)
        costs = self.l1_weight, self.giou_weight
        index, found = zip(
            *(queries_of(one, objects, *costs) for one in (own, other))
        )
        both = found[0] & found[1]  # 1, N, M
        logits, targets, softmax = class_logits(own, other)
        logits, boxes, states = (
            [pick_queries(*one) for one in zip(pair, index)]
            for pair in (
                (logits, targets),
                (own.boxes, other.boxes),
                (own.states, other.states),
            )
        )
        l1, error = query_box_errors(*boxes)
        classes = query_class_divergence(*logits, softmax, self.temperature)
        distance = self.l1_weight * l1 + self.giou_weight * error
        flat = 0, gt.image, gt.place
        rows = [gather_rows(as_float(one)[flat]) for one in states]
        kept = gather_rows(both[flat])
        with full_precision(rows[0]):
            pair = torch.cat([self.projection(rows[0]), rows[1]])
        shares = dict(
            ss=relation_divergence(*rows, kept),
            sc=supervised_contrast(
                pair,
                labels.repeat(2),
                self.contrast_temperature,
                kept.repeat(2),
            ),
            kd=weighted_mean(classes, both),
            box=weighted_mean(distance, both),
        )
        return {key: self.weights[key] * one for key, one in shares.items()}


# What layers say -------------------------------------------------------------


def _layers(detector: nn.Module, part: str) -> list[str]:
    count = len(detector.get_submodule(part).layers)
    return [f'{part}.layers.{index}' for index in range(count)]


def _heads_at(detector: nn.Module, layer: str) -> str:
    """Where the outputs of the heads of a layer's self-attention are."""
    path = f'{layer}.self_attn'
    attention = detector.get_submodule(path)
    if hasattr(attention, 'output_proj'):  # deformable
        return f'{path}.output_proj'
    if hasattr(attention, 'out_proj'):  # conditional
        return f'{path}.out_proj'
    return f'{path}.attn'


def _heads(outputs: Outputs, layer: str) -> Tensor:
    """Outputs of all heads, one beside the other, (N, T, C)."""
    path = _heads_at(outputs.detector, layer)
    args, given = outputs.inputs(path)
    module = outputs.detector.get_submodule(path)
    if hasattr(module, 'in_proj_weight'):  # nn.MultiheadAttention's
        return heads_of(module, args, given)[0]
    return args[0]


def _own_heads(outputs: Outputs) -> Tensor:
    """Those of the decoder, of a detector's own queries, (L, N, Q, C)."""
    detector = outputs.detector
    layers = _layers(detector, 'decoder')
    found = torch.stack([_heads(outputs, layer) for layer in layers])
    return found[:, :, own_queries(detector, found.shape[2])]


def _entering(outputs: Outputs) -> tuple[Tensor, ...]:
    """The maps that become the encoder's tokens."""
    path = maps_path(outputs.detector)
    maps = maps_of(outputs.at(path), f'The tap {path!r}')
    return maps[-len(map_sizes(outputs)) :]


def _as_maps(outputs: Outputs, tokens: Tensor) -> tuple[Tensor, ...]:
    return to_maps(tokens.mT, map_sizes(outputs))
