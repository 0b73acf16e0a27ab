"""What the heads of an attention return, before they are mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.ops.numeric import as_float, full_precision


def heads_of(
    attention: nn.MultiheadAttention, args: tuple, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Do once more what ``nn.MultiheadAttention`` does inside.

    It mixes its heads with no module of its own, so that their outputs cannot
    be tapped. Dropout is left out.

    Args:
        attention: Whose query, key and value have one width.
        args, given: What it was called with.

    Returns:
        Outputs of all heads, one beside the other, (N, T, C), and the rows of
        attention, (N, heads, T, S); in float32.

    Example:
        >>> mixed = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> heads, rows = heads_of(mixed, (x, x, x), {})
        >>> torch.allclose(mixed.out_proj(heads), mixed(x, x, x)[0], atol=1e-5)
        True
        >>> rows.shape
        torch.Size([3, 2, 5, 5])
    """
    names = 'query', 'key', 'value', 'key_padding_mask'
    given = {**dict(zip(names, args)), **given}
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias
    biases = (None,) * 3 if biases is None else biases.chunk(3)
    with full_precision(given['query']):
        query, key, value = (
            F.linear(
                as_float(given[name]),
                as_float(weight),
                None if bias is None else as_float(bias),
            )
            for name, weight, bias in zip(names, weights, biases)
        )
        if not attention.batch_first:
            query, key, value = (
                one.transpose(0, 1) for one in (query, key, value)
            )
        query, key, value = (
            one.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for one in (query, key, value)
        )  # N, heads, T, C / heads
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        rows = _masked(logits, given).softmax(-1)
        heads = (rows @ value).transpose(1, 2).flatten(2)
    return heads, rows


def _masked(logits: Tensor, given: Mapping[str, Any]) -> Tensor:
    mask, padding = given.get('attn_mask'), given.get('key_padding_mask')
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (len(logits), -1))
    if padding is not None:
        padding = padding[:, None, None]
    for one in (mask, padding):
        if one is None:
            continue
        if one.dtype == torch.bool:
            logits = logits.masked_fill(one, float('-inf'))
        else:
            logits = logits + one
    return logits
