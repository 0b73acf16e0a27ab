"""Attention from the inside: what its own module returns, made again."""

import pytest
import torch
from torch import nn

from mmkd.ops.heads import attention_rows, heads_of, mixed_values, projected


@pytest.mark.parametrize('first', [True, False])
def test_heads_mixed_are_what_attention_returns(first):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=first)
    nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(3, 5, 8)
    given = x if first else x.transpose(0, 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[0, 2] = True
    heads, rows = heads_of(
        attention,
        (given, given, given),
        dict(key_padding_mask=padding, attn_mask=mask),
    )
    expected, seen = attention(
        given,
        given,
        given,
        key_padding_mask=padding,
        attn_mask=mask,
        average_attn_weights=False,
    )
    if not first:
        expected = expected.transpose(0, 1)
    torch.testing.assert_close(attention.out_proj(heads), expected)
    torch.testing.assert_close(rows, seen)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, 2, 5))


def test_masks_that_are_added_and_those_that_leave_out_are_one():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    out = torch.rand(3, 5) > 0.6
    out[:, 0] = False
    added = torch.zeros(3, 5).masked_fill(out, float('-inf'))
    one, other = (
        attention_rows(query, key, 2, dict(attn_mask=mask))
        for mask in (out, added)
    )
    assert torch.equal(one, other)
    assert not one[:, :, out].any()
    of_each = out.expand(4, 3, 5)  # of images and heads
    third = attention_rows(query, key, 2, dict(attn_mask=of_each))
    assert torch.equal(one, third)


def test_a_row_by_hand():
    query = torch.tensor([[[2.0, 0, 0, 0]]])
    key = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0]]])
    rows = attention_rows(query, key, 1, {})  # logits 1 and 0
    chance = torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(
        rows, torch.stack([chance, 1 - chance]).view(1, 1, 1, 2)
    )
    value = torch.tensor([[[4.0], [0.0]]])
    torch.testing.assert_close(
        mixed_values(rows, value), (4 * chance).view(1, 1, 1)
    )


@pytest.mark.parametrize('name', ['query', 'key', 'value'])
def test_each_is_projected_by_its_own_matrix(name):
    attention = nn.MultiheadAttention(4, 1, bias=False)
    given = {one: torch.randn(3, 2, 4) for one in ('query', 'key', 'value')}
    place = list(given).index(name)
    weight = attention.in_proj_weight[4 * place : 4 * place + 4]
    named = {key: one for key, one in given.items() if key != 'query'}
    found = projected(attention, (given['query'],), named, name)
    expected = (given[name] @ weight.T).transpose(0, 1)
    torch.testing.assert_close(found, expected)
