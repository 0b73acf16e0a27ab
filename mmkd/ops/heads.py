"""What attention does inside, where no module of its own can be tapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.ops.numeric import as_float, full_precision

#: What attention is called with, in this order.
ARGUMENTS = ('query', 'key', 'value', 'key_padding_mask')


def projected(
    attention: nn.Module, args: tuple, given: Mapping[str, Any], name: str
) -> Tensor:
    """Queries, keys or values of ``nn.MultiheadAttention``.

    Args:
        attention: One whose query, key and value have one width, or what
            stands for it: it has ``in_proj_weight`` and ``in_proj_bias``.
        args, given: What it was called with.
        name: ``'query'``, ``'key'`` or ``'value'``.

    Returns:
        (N, T, C), in float32.
    """
    given = _named(args, given)
    place = ARGUMENTS.index(name)
    weight = attention.in_proj_weight.chunk(3)[place]
    bias = attention.in_proj_bias
    if bias is not None:
        bias = as_float(bias.chunk(3)[place])
    with full_precision(given[name]):
        found = F.linear(as_float(given[name]), as_float(weight), bias)
    return found if attention.batch_first else found.transpose(0, 1)


def attention_rows(
    query: Tensor, key: Tensor, heads: int, given: Mapping[str, Any]
) -> Tensor:
    """How much each query looks at each key, head by head.

    Args:
        query, key: Projected, (N, T, C) and (N, S, C).
        heads: How many.
        given: By name ``attn_mask`` and ``key_padding_mask``, if there are.

    Returns:
        Rows that sum to 1, (N, heads, T, S), in the precision of the query.
    """
    query, key = (_split(one, heads) for one in (query, key))
    logits = query @ key.mT / query.shape[-1] ** 0.5
    return _masked(logits, given).softmax(-1)


def mixed_values(rows: Tensor, value: Tensor) -> Tensor:
    """Outputs of all heads, one beside the other.

    Args:
        rows: Of attention, (N, heads, T, S).
        value: Projected, (N, S, C).

    Returns:
        (N, T, C).
    """
    return (rows @ _split(value, rows.shape[1])).transpose(1, 2).flatten(2)


def heads_of(
    attention: nn.Module, args: tuple, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Do once more what ``nn.MultiheadAttention`` does inside.

    It mixes its heads with no module of its own, so that their outputs cannot
    be tapped. Dropout is left out.

    Args:
        attention: As of :func:`projected`.
        args, given: What it was called with.

    Returns:
        Outputs of all heads, one beside the other, (N, T, C), and the rows of
        attention, (N, heads, T, S); in float32.

    Example:
        >>> import torch
        >>> mixed = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> heads, rows = heads_of(mixed, (x, x, x), {})
        >>> torch.allclose(mixed.out_proj(heads), mixed(x, x, x)[0], atol=1e-5)
        True
        >>> rows.shape
        torch.Size([3, 2, 5, 5])
    """
    query, key, value = (
        projected(attention, args, given, name) for name in ARGUMENTS[:3]
    )
    with full_precision(query):
        rows = attention_rows(
            query, key, attention.num_heads, _named(args, given)
        )
        return mixed_values(rows, value), rows


def _named(args: tuple, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(ARGUMENTS, args)), **given}


def _split(tokens: Tensor, heads: int) -> Tensor:
    """(N, T, C) → (N, heads, T, C / heads)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _masked(logits: Tensor, given: Mapping[str, Any]) -> Tensor:
    mask, padding = given.get('attn_mask'), given.get('key_padding_mask')
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (len(logits), -1))
    if padding is not None:
        padding = padding[:, None, None]
    for one in (mask, padding):
        if one is None:
            continue
        if one.is_floating_point():
            logits = logits + one
        else:
            logits = logits.masked_fill(one.bool(), float('-inf'))
    return logits
