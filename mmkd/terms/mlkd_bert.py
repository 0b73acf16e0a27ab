"""MLKD-BERT: layers relate their tokens as the teacher's layers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mmdet.models.backbones import SwinTransformer
from torch import Tensor, nn

from mmkd.checks import check_channels, check_name, check_positive
from mmkd.ops.masks import valid_mask
from mmkd.ops.numeric import as_float, full_precision
from mmkd.ops.relations import relation_divergence
from mmkd.ops.windows import grid_tokens, map_to_windows, windows_to_map
from mmkd.registry import MODELS
from mmkd.structures import Outputs, Step
from mmkd.taps import crop, maps_of, pick_levels, resolve
from mmkd.terms.term import Term

if TYPE_CHECKING:
    from mmkd.teachers import Teacher


def uniform_map(student: int, teacher: int) -> list[int]:
    """Which of the teacher's layers each of the student's learns from.

    The last learns from the last, the others evenly before it.

    Example:
        >>> uniform_map(6, 18)
        [2, 5, 8, 11, 14, 17]
        >>> uniform_map(2, 3), uniform_map(3, 2)
        ([1, 2], [0, 1, 1])
    """
    return [
        math.ceil((layer + 1) * teacher / student) - 1
        for layer in range(student)
    ]


@dataclass(frozen=True)
class Layer:
    """A block of a Swin backbone, and where its outputs are tapped.

    Attributes:
        path: Of the block.
        window: Side of its windows, cells.
        shift: How far they are shifted.
        heads: Of its attention.
        channels: Of its tokens.
    """

    path: str
    window: int
    shift: int
    heads: int
    channels: int

    @property
    def attention(self) -> str:
        """What takes the heads' outputs, one beside the other."""
        return f'{self.path}.attn.w_msa.proj'

    @classmethod
    def of(cls, block: nn.Module, path: str) -> Layer:
        attention = block.attn
        return cls(
            path=path,
            window=attention.window_size,
            shift=attention.shift_size,
            heads=attention.w_msa.num_heads,
            channels=attention.w_msa.embed_dims,
        )


@MODELS.register_module()
class MLKDBertLayersTerm(Term):
    r"""Embedding, attention and output of each layer, the first stage.

    Of T tokens X the relation is :math:`R(X) = softmax(X X^\top / \sqrt C)`,
    by rows, and D the mean divergence of its rows from the teacher's. Layer n
    of the student learns from layer m(n) of the teacher:

    .. math::
        emb &= D(E^S, E^T) \\
        mha &= \sum_n \frac{1}{A} \sum_{a=1}^A
            D(O^S_{n,a}, O^T_{m(n),a}) \\
        ffn &= \sum_n MSE(H^S_n W_n, H^T_{m(n)})

    E are patch embeddings, on a grid. O are the outputs of all heads of an
    attention before they are mixed, cut into A splits: as many as the student
    has heads, so that the teacher may have another number, and other widths.
    They are related within the windows of the student's block; the teacher's
    are put together to a map first, so that its windows may be of another
    size or place. H are the outputs of blocks, and W, one a stage, learns
    along. Tokens of the padded border neither count nor are looked at.

    With ``attn=False`` the same is said of feature maps, for detectors without
    attention: each map is embedding and output at once, as ``fpn_emb`` and
    ``fpn_ffn``, and there is no attention to imitate.

    Args:
        teacher: Name of the teacher.
        student_channels, teacher_channels: Of each stage, or of each map with
            ``attn=False``.
        tap: The Swin backbone of both; what returns the maps with
            ``attn=False``. ``'backbone'``, or ``'neck'``, if None.
        attn: Whether there is attention.
        levels: Which stages, or which maps; as many as there are channels if
            None.
        layer_map: ``'uniform'``, see :func:`uniform_map`, by stage; or, of
            each stage, the teacher's block for each of the student's.
        splits: ``'student'``, or the number A.
        grid: Rows and columns of the grid of embeddings.
        emb_weight, mha_weight, ffn_weight: Of each part. The paper adds them
            as they are.
        schedule: Factor over the training; constant 1 if None.

    Returns:
        ``emb``, ``mha`` and ``ffn``; ``fpn_emb`` and ``fpn_ffn`` with
        ``attn=False``.

    Raises:
        ValueError: If a backbone is no Swin, channels, blocks or splits do
            not fit, or the teacher has a cache, while the model is built.

    Reference:
        Zhang et al., "MLKD-BERT: Multi-level Knowledge Distillation for
        Pre-trained Language Models", arXiv:2407.02775. Read: a summary; no
        code is known. Ours: windows, stages and the grid in place of a
        sentence, one W a stage, that ``mha`` is added over the layers as
        ``ffn`` is, and ``attn=False``. Encoders and decoders of DETR and
        its kind are read by
        :class:`mmkd.terms.mlkd_bert_queries.MLKDBertQueryLayersTerm`.
    """

    def __init__(
        self,
        teacher: str,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        tap: str | None = None,
        attn: bool = True,
        levels: Sequence[int] | None = None,
        layer_map: str | Sequence[Sequence[int]] = 'uniform',
        splits: str | int = 'student',
        grid: tuple[int, int] = (16, 16),
        emb_weight: float = 1.0,
        mha_weight: float = 1.0,
        ffn_weight: float = 1.0,
        schedule: Mapping | None = None,
    ) -> None:
        super().__init__(schedule)
        self.teacher, self.attn = teacher, attn
        self.path = tap or ('backbone' if attn else 'neck')
        self.student_channels = tuple(student_channels)
        self.teacher_channels = tuple(teacher_channels)
        self.levels = tuple(
            range(len(self.student_channels)) if levels is None else levels
        )
        _check_counts(self)
        if isinstance(layer_map, str):
            check_name(
                'MLKDBertLayersTerm', 'layer_map', layer_map, ['uniform']
            )
        if isinstance(splits, str):
            check_name('MLKDBertLayersTerm', 'splits', splits, ['student'])
        else:
            check_positive('MLKDBertLayersTerm', splits=splits)
        self.layer_map, self.splits = layer_map, splits
        rows, columns = grid
        check_positive('MLKDBertLayersTerm', rows=rows, columns=columns)
        self.grid = rows, columns
        self.emb_weight = emb_weight
        self.mha_weight, self.ffn_weight = mha_weight, ffn_weight
        self.projections = nn.ModuleList(
            nn.Conv2d(one, other, 1, bias=False)
            for one, other in zip(self.student_channels, self.teacher_channels)
        )
        self.pairs: list[list[tuple[Layer, Layer]]] = []

    def silent(self) -> bool:
        parts = [self.emb_weight, self.ffn_weight]
        return not any([*parts, self.mha_weight] if self.attn else parts)

    # What is tapped ----------------------------------------------------------

    def bind(
        self, student: nn.Module, teachers: Mapping[str, Teacher]
    ) -> None:
        check_name('The distiller', 'teacher', self.teacher, teachers)
        teacher = teachers[self.teacher]
        self.teacher_names = [self.teacher]
        if not self.attn:
            self.tap(student, self.path)
            teacher.tap(self.path)
            return
        if teacher.memory is not None:
            raise ValueError(
                f'MLKDBertLayersTerm reads what attention hands on, which a '
                f'teacher with a cache does not keep. Set cache=0 for teacher '
                f'{self.teacher!r}.'
            )
        own, other = (
            self._stages(detector, side)
            for detector, side in (
                (student, 'student'),
                (teacher.detector, 'teacher'),
            )
        )
        self.pairs = [
            self._paired(index, *stages)
            for index, stages in enumerate(zip(own, other))
        ]
        taps = [lambda path: self.tap(student, path), teacher.tap]
        for side, tap in enumerate(taps):
            tap(f'{self.path}.patch_embed')
            for stage in self.pairs:
                for pair in stage:
                    tap(pair[side].path)
                    tap(pair[side].attention)

    def _stages(self, detector: nn.Module, side: str) -> list[list[Layer]]:
        """The blocks of the stages that count."""
        backbone, _ = resolve(detector, self.path)
        if not isinstance(backbone, SwinTransformer):
            raise ValueError(
                f'MLKDBertLayersTerm imitates attention within windows, but '
                f"the {side}'s {self.path!r} is a {type(backbone).__name__} "
                f'and not a SwinTransformer. Choose a pair with Swin '
                f'backbones, or set attn=False to imitate the maps of the '
                f'neck.'
            )
        stages = backbone.stages
        if max(self.levels) >= len(stages):
            raise ValueError(
                f'MLKDBertLayersTerm has levels={self.levels}, but the '
                f"{side}'s backbone has {len(stages)} stages, 0 to "
                f'{len(stages) - 1}. Name those that are there.'
            )
        channels = getattr(self, f'{side}_channels')
        found = []
        for level, expected in zip(self.levels, channels):
            blocks = stages[level].blocks
            layers = [
                Layer.of(one, f'{self.path}.stages.{level}.blocks.{index}')
                for index, one in enumerate(blocks)
            ]
            if layers[0].channels != expected:
                raise ValueError(
                    f'MLKDBertLayersTerm was built for {expected} channels in '
                    f'stage {level} of the {side}, which has '
                    f'{layers[0].channels}. Set {side}_channels to those of '
                    f'its stages.'
                )
            if side == 'student' and any(one.with_cp for one in blocks):
                raise ValueError(
                    'MLKDBertLayersTerm reads what happens inside of blocks, '
                    'which the student computes anew for the gradient. Set '
                    'model.backbone.with_cp=False.'
                )
            found.append(layers)
        return found

    def _paired(
        self, index: int, own: list[Layer], other: list[Layer]
    ) -> list[tuple[Layer, Layer]]:
        """Each of the student's blocks, and what it learns from."""
        if self.layer_map == 'uniform':
            places = uniform_map(len(own), len(other))
        else:
            places = list(self.layer_map[index])
        if len(places) != len(own) or not all(
            0 <= place < len(other) for place in places
        ):
            raise ValueError(
                f'MLKDBertLayersTerm has layer_map={places} for stage '
                f'{self.levels[index]}, where the student has {len(own)} '
                f'blocks and the teacher {len(other)}, 0 to '
                f'{len(other) - 1}. Name one of these for each of the '
                f"student's, or set layer_map='uniform'."
            )
        pairs = [(one, other[place]) for one, place in zip(own, places)]
        for one, like in pairs:
            splits = self._splits(one)
            for layer in (one, like):
                if layer.channels % splits:
                    raise ValueError(
                        f'MLKDBertLayersTerm cuts {layer.channels} channels '
                        f'of {layer.path!r} into {splits} splits of one '
                        f'width, which leaves a rest. Set splits= to a '
                        f'number that divides the channels of both sides.'
                    )
        return pairs

    def _splits(self, layer: Layer) -> int:
        return layer.heads if self.splits == 'student' else self.splits

    # The loss ----------------------------------------------------------------

    def forward(self, step: Step) -> dict[str, Tensor]:
        shown = step.teacher(self.teacher)
        if not self.attn:
            return self._of_maps(step, shown)
        sides = step.student, shown
        embeddings = self._same(
            step,
            shown,
            *(_grid_of(one, f'{self.path}.patch_embed') for one in sides),
        )
        parts = dict(emb=self.emb_weight * self._embedding(step, *embeddings))
        heard, left = [], []
        for pairs, projection in zip(self.pairs, self.projections):
            for own, other in pairs:
                layers = own, other
                outputs = self._same(
                    step,
                    shown,
                    *map(_block_of, sides, layers),
                )
                left.append(self._output(step, projection, *outputs))
                attentions = self._same(
                    step,
                    shown,
                    *map(attention_of, sides, layers),
                )
                heard.append(self._attention(step, own, *attentions))
        parts['mha'] = self.mha_weight * sum(heard)
        parts['ffn'] = self.ffn_weight * sum(left)
        return parts

    def _of_maps(self, step: Step, shown: Outputs) -> dict[str, Tensor]:
        who = f'The tap {self.path!r}'
        student, teacher = (
            pick_levels(maps_of(one.at(self.path), who), self.levels, who)
            for one in (step.student, shown)
        )
        for maps, side in ((student, 'student'), (teacher, 'teacher')):
            channels = getattr(self, f'{side}_channels')
            for one, expected in zip(maps, channels):
                check_channels(
                    f'MLKDBertLayersTerm, {side}_channels,', one, expected
                )
        pairs = [
            self._same(step, shown, one, other)
            for one, other in zip(student, teacher)
        ]
        emb = sum(self._embedding(step, *pair) for pair in pairs)
        ffn = sum(
            self._output(step, projection, *pair)
            for projection, pair in zip(self.projections, pairs)
        )
        return dict(
            fpn_emb=self.emb_weight * emb, fpn_ffn=self.ffn_weight * ffn
        )

    def _embedding(self, step: Step, own: Tensor, other: Tensor) -> Tensor:
        valid = _valid(step, own)
        (tokens, there), (like, _) = (
            grid_tokens(one, valid, self.grid) for one in (own, other)
        )
        return relation_divergence(tokens, like, there)

    def _attention(
        self, step: Step, layer: Layer, own: Tensor, other: Tensor
    ) -> Tensor:
        valid = _valid(step, own)
        splits = self._splits(layer)
        tokens, like, there = (
            map_to_windows(one, layer.window, layer.shift)
            for one in (_kept(own, valid), _kept(other, valid), valid)
        )  # N, windows, T, C
        tokens, like = (
            one.unflatten(3, (splits, -1)).transpose(2, 3)
            for one in (tokens, like)
        )  # N, windows, A, T, C / A
        return relation_divergence(tokens, like, there[:, :, None, :, 0])

    def _output(
        self, step: Step, projection: nn.Module, own: Tensor, other: Tensor
    ) -> Tensor:
        valid = _valid(step, own)
        with full_precision(own):
            error = projection(_kept(own, valid)) - _kept(other, valid)
        count = valid.sum() * error.shape[1]
        return error.square().sum() / count

    def _same(
        self, step: Step, shown: Outputs, own: Tensor, other: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both maps on the same cells, the teacher's without gradient."""
        size = step.images.shape[-2:]
        (other,) = crop((other.detach(),), shown.size, size)
        if own.shape[-2:] != other.shape[-2:]:
            raise ValueError(
                f'MLKDBertLayersTerm compares tokens one by one, got '
                f'{tuple(own.shape[-2:])} rows and columns of the student '
                f'and {tuple(other.shape[-2:])} of the teacher. Choose a '
                f'teacher of the same strides, and levels= of both.'
            )
        return own, other


def _check_counts(term: MLKDBertLayersTerm) -> None:
    counts = [
        len(one)
        for one in (term.levels, term.student_channels, term.teacher_channels)
    ]
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(
            f'MLKDBertLayersTerm needs the channels of each level on both '
            f'sides, got {counts[0]} levels, {counts[1]} student_channels and '
            f'{counts[2]} teacher_channels. Give as many of each, at least 1.'
        )


def _valid(step: Step, feature: Tensor) -> Tensor:
    """1 at cells of the images, 0 in the padded border, (N, 1, H, W)."""
    return valid_mask(step.gt, tuple(feature.shape[-2:]), keep_ignored=True)


def _kept(feature: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid > 0, as_float(feature), 0)


def _to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(N, H·W, C) → (N, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


def _grid_of(outputs: Outputs, path: str) -> Tensor:
    """Patch embeddings as a map."""
    return _to_map(*outputs.at(path))


def _size_of(outputs: Outputs, layer: Layer) -> tuple[int, int]:
    """Rows and columns of a block's map."""
    args, _ = outputs.inputs(layer.path)
    return tuple(args[1])


def _block_of(outputs: Outputs, layer: Layer) -> Tensor:
    """What a block returns, as a map."""
    return _to_map(outputs.at(layer.path), _size_of(outputs, layer))


def attention_of(outputs: Outputs, layer: Layer) -> Tensor:
    """What the heads of a block return, one beside the other, as a map."""
    (windows,), _ = outputs.inputs(layer.attention)
    return windows_to_map(
        windows, _size_of(outputs, layer), layer.window, layer.shift
    )
