"""Detectors whose matrices are products of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.checks import check_name, suggest
from mmkd.ops.heads import attention_rows, mixed_values
from mmkd.ops.low_rank import truncated
from mmkd.registry import DETECTORS, MODELS

#: Layers of several matrices on top of each other, by their name.
STACKED = {'qkv': 3, 'kv': 2}
#: What is left as it is: where attention looks is no projection.
SKIPPED = (
    'sampling_offsets',
    'attention_weights',
    'relative_position',
    'query_scale',
    'ref_point_head',
    'ref_anchor_head',
)


class LowRankLinear(nn.Module):
    """A linear layer whose matrix is a product of two thin ones.

    It loads the weights of the dense layer that it stands for as well: from
    these it takes the nearest product of its rank.

    Args:
        in_features: Features that come in, n.
        out_features: Features that go out, m.
        rank: r of each matrix.
        bias: Whether a bias is added.
        stacked: How many matrices of (m / stacked, n) the layer holds on top
            of each other, each a product of its own.

    Raises:
        ValueError: If the matrices have no such rank.

    Example:
        >>> dense, thin = nn.Linear(6, 4), LowRankLinear(6, 4, rank=4)
        >>> _ = thin.load_state_dict(dense.state_dict())
        >>> x = torch.randn(2, 6)
        >>> torch.allclose(thin(x), dense(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        stacked: int = 1,
    ) -> None:
        super().__init__()
        rows, rest = divmod(out_features, stacked)
        if rest or not 1 <= rank <= min(rows, in_features):
            raise ValueError(
                f'LowRankLinear cannot make {stacked} matrices of rank {rank} '
                f'of {out_features} x {in_features} features; ranks go up to '
                f'{min(rows, in_features)}.'
            )
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.stacked = rank, stacked
        self.down = nn.Parameter(torch.empty(stacked, rank, in_features))
        self.up = nn.Parameter(torch.empty(stacked, rows, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw anew: the product varies as the weights of a dense layer."""
        std = (3 * self.in_features * self.rank) ** -0.25
        for one in (self.down, self.up):
            nn.init.normal_(one, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features, (..., n) → (..., m)."""
        thin = F.linear(x, self.down.flatten(0, 1))
        parts = zip(thin.chunk(self.stacked, dim=-1), self.up)
        y = torch.cat([F.linear(one, up) for one, up in parts], dim=-1)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """The matrix that the product stands for, (m, n)."""
        return (self.up @ self.down).flatten(0, 1)

    def part(self, x: Tensor, index: int) -> Tensor:
        """What one of the stacked matrices makes of features."""
        bias = None if self.bias is None else self.bias.chunk(self.stacked)
        thin = F.linear(x, self.down[index])
        return F.linear(thin, self.up[index], bias and bias[index])

    def adopt(self, state: dict[str, Tensor], prefix: str = '') -> None:
        """Replace the dense layer's weight in a state dict by the product."""
        dense = state.pop(f'{prefix}weight', None)
        if dense is None:
            return
        wanted = (self.out_features, self.in_features)
        if tuple(dense.shape) != wanted:
            raise ValueError(
                f'LowRankLinear {prefix.rstrip(".")!r} stands for a matrix of '
                f'{wanted}, got {tuple(dense.shape)}. Factorize the detector '
                f'whose weights are loaded.'
            )
        pairs = [
            truncated(one, self.rank) for one in dense.chunk(self.stacked)
        ]
        state[f'{prefix}up'] = torch.stack([up for up, _ in pairs])
        state[f'{prefix}down'] = torch.stack([down for _, down in pairs])

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any
    ) -> None:
        self.adopt(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f'in_features={self.in_features}, '
            f'out_features={self.out_features}, rank={self.rank}, '
            f'stacked={self.stacked}'
        )


class LowRankAttention(nn.Module):
    """``nn.MultiheadAttention`` whose matrices are products of thin ones.

    Called and loaded as that; the matrices of queries, keys, values and
    output are each a product of their own.

    Args:
        whole: What it stands for, of one width and without added keys.
        rank: Of each of the four matrices.

    Example:
        >>> whole = nn.MultiheadAttention(8, 2)
        >>> thin = LowRankAttention(whole, rank=8)
        >>> _ = thin.load_state_dict(whole.state_dict())
        >>> x = torch.randn(5, 3, 8)
        >>> torch.allclose(thin(x, x, x)[0], whole(x, x, x)[0], atol=1e-5)
        True
    """

    def __init__(self, whole: nn.MultiheadAttention, rank: int) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = whole.embed_dim, whole.num_heads
        self.batch_first, self.dropout = whole.batch_first, whole.dropout
        width, bias = whole.embed_dim, whole.in_proj_bias is not None
        self.in_proj = LowRankLinear(width, 3 * width, rank, bias, stacked=3)
        self.out_proj = LowRankLinear(width, width, rank, bias)

    @property
    def in_proj_weight(self) -> Tensor:
        """The matrices that the products stand for, (3 C, C)."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``."""
        if not self.batch_first:
            query, key, value = (
                one.transpose(0, 1) for one in (query, key, value)
            )
        query, key, value = (
            self.in_proj.part(one, index)
            for index, one in enumerate((query, key, value))
        )
        masks = dict(attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        rows = attention_rows(query, key, self.num_heads, masks)
        rows = F.dropout(rows, self.dropout, self.training)
        found = self.out_proj(mixed_values(rows.to(value.dtype), value))
        if not self.batch_first:
            found = found.transpose(0, 1)
        if average_attn_weights:
            rows = rows.mean(1)
        return found, rows if need_weights else None

    def adopt(self, state: dict[str, Tensor], prefix: str = '') -> None:
        """Name the whole one's matrices in a state dict as its own."""
        for end in ('weight', 'bias'):
            one = state.pop(f'{prefix}in_proj_{end}', None)
            if one is not None:
                state[f'{prefix}in_proj.{end}'] = one

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any
    ) -> None:
        self.adopt(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


@MODELS.register_module(name='Factorized')
def factorized(
    detector: str,
    rank_ratio: float | str = 0.5,
    parts: Sequence[str] = ('backbone',),
    **settings: Any,
) -> nn.Module:
    """A detector whose linear layers are products of two thin matrices.

    It keeps the depth and width of the detector that it is made of, and loads
    its checkpoints: with ``inherit=('backbone', 'neck', 'bbox_head')`` of a
    teacher, or ``load_from``, the student starts as the teacher, factorized.

    Args:
        detector: Type of the detector, whose arguments stand beside it.
        rank_ratio: Share of each matrix's weights that is kept: a matrix of
            (m, n) gets rank ``rank_ratio * m * n / (m + n)``. ``'full'`` keeps
            the rank, for checks; the layers are larger then.
        parts: Parts whose linear layers are factorized, those inside of
            ``nn.MultiheadAttention`` too; of a DETR ``('encoder',
            'decoder')``. Layers that would not shrink stay as they are, and
            so do convolutions, and what says where attention looks.
        **settings: Arguments of the detector.

    Returns:
        An instance of the detector's class.

    Raises:
        ValueError: If a part is unknown or has nothing to factorize.

    Reference:
        Liu et al., "Multi-Aspect Knowledge Distillation for Language Model
        with Low-rank Factorization", arXiv:2604.03110. That the ratio counts
        weights, and which layers of a detector are meant, is ours.
    """
    model = DETECTORS.build(dict(settings, type=detector))
    factorize(model, rank_ratio, parts, keep=False)
    return model


def factorize(
    model: nn.Module,
    rank_ratio: float | str = 0.5,
    parts: Sequence[str] = ('backbone',),
    keep: bool = True,
) -> dict[str, LowRankLinear]:
    """Replace the linear layers of a model's parts.

    Args:
        model: Changed in place.
        rank_ratio, parts: As of :func:`factorized`.
        keep: Whether the new layers are the nearest products of the old ones;
            new random numbers if not.

    Returns:
        The new layers by their path.

    Raises:
        ValueError: As :func:`factorized`.
    """
    _check_ratio(rank_ratio)
    parts = (parts,) if isinstance(parts, str) else tuple(parts)
    known = [name for name, _ in model.named_modules()]
    replaced = {}
    for part in parts:
        if part not in known:
            raise ValueError(
                f'Factorized: {type(model).__name__} has no part {part!r}. '
                f'{suggest(part, known)}'
            )
        found = dict(
            _replace(model.get_submodule(part), rank_ratio, part, keep)
        )
        if not found:
            raise ValueError(
                f'Factorized: no linear layer of {part!r} shrinks with '
                f'rank_ratio={rank_ratio!r}. Factorized is for networks of '
                f'linear layers, such as Swin; name a part that has them, or '
                f'a smaller ratio.'
            )
        replaced |= found
    return replaced


def rank_of(rows: int, columns: int, ratio: float | str) -> int | None:
    """Rank of a factorized matrix; None if it would not shrink.

    Example:
        >>> rank_of(96, 384, 0.5), rank_of(96, 384, 'full'), rank_of(4, 4, 2)
        (38, 96, None)
    """
    if ratio == 'full':
        return min(rows, columns)
    rank = max(1, int(ratio * rows * columns / (rows + columns)))
    return rank if rank * (rows + columns) < rows * columns else None


def _check_ratio(ratio: float | str) -> None:
    if ratio == 'full':
        return
    if isinstance(ratio, str):
        check_name('Factorized', 'rank_ratio', ratio, ['full'])
    if not (math.isfinite(ratio) and 0 < ratio < 1):
        raise ValueError(
            f'Factorized keeps a share of the weights between 0 and 1, got '
            f"rank_ratio={ratio}. Use for instance 0.5, or 'full'."
        )


def _replace(
    parent: nn.Module, ratio: float | str, path: str, keep: bool
) -> Iterator[tuple[str, LowRankLinear]]:
    for name, child in parent.named_children():
        here = f'{path}.{name}'
        if name in SKIPPED:
            continue
        if isinstance(child, nn.MultiheadAttention):
            if thin := _thin_attention(child, ratio, keep):
                setattr(parent, name, thin)
                yield f'{here}.in_proj', thin.in_proj
                yield f'{here}.out_proj', thin.out_proj
        elif not isinstance(child, nn.Linear):
            yield from _replace(child, ratio, here, keep)
        elif thin := _thin(name, child, ratio, keep):
            setattr(parent, name, thin)
            yield here, thin


def _thin_attention(
    whole: nn.MultiheadAttention, ratio: float | str, keep: bool
) -> LowRankAttention | None:
    rank = rank_of(whole.embed_dim, whole.embed_dim, ratio)
    plain = whole.in_proj_weight is not None and whole.bias_k is None
    if rank is None or not plain or whole.add_zero_attn:
        return None
    thin = LowRankAttention(whole, rank)
    if keep:
        thin.load_state_dict(whole.state_dict())
    return thin.train(whole.training)


def _thin(
    name: str, dense: nn.Linear, ratio: float | str, keep: bool
) -> LowRankLinear | None:
    stacked = STACKED.get(name, 1)
    rows, columns = dense.weight.shape
    rank = rank_of(rows // stacked, columns, ratio)
    if rank is None:
        return None
    thin = LowRankLinear(
        columns, rows, rank, bias=dense.bias is not None, stacked=stacked
    )
    if keep:
        thin.load_state_dict(dense.state_dict())
    return thin.train(dense.training)


def sizes(layers: Mapping[str, LowRankLinear]) -> list[tuple[str, int, int]]:
    """Path, weights of the dense matrix, and weights kept, of each layer."""
    return [
        (
            path,
            one.in_features * one.out_features,
            one.up.numel() + one.down.numel(),
        )
        for path, one in layers.items()
    ]
