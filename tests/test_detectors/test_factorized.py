"""Detectors of thin matrices."""

import copy

import pytest
import tiny
import torch
from mmengine.runner.checkpoint import load_state_dict
from swins import swin, thin
from torch import nn

from mmkd.detectors.factorized import (
    LowRankLinear,
    factorize,
    rank_of,
    sizes,
)


@pytest.mark.parametrize('stacked', [1, 3])
def test_a_layer_is_the_dense_layer_of_its_product(stacked):
    layer = LowRankLinear(5, 12, rank=2, stacked=stacked)
    x = torch.randn(2, 3, 5)
    wanted = torch.cat(
        [x @ (up @ down).T for up, down in zip(layer.up, layer.down)], -1
    )
    torch.testing.assert_close(layer(x), wanted + layer.bias)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    )


@pytest.mark.parametrize('stacked', [1, 3])
@pytest.mark.parametrize('load', [nn.Module.load_state_dict, load_state_dict])
def test_it_takes_the_nearest_product_of_each_matrix(stacked, load):
    dense = nn.Linear(6, 12)
    layer = LowRankLinear(6, 12, rank=2, stacked=stacked)
    load(layer, dense.state_dict())
    error = (layer.weight - dense.weight).square().sum()
    tail = sum(
        torch.linalg.svdvals(one)[2:].square().sum()
        for one in dense.weight.chunk(stacked)
    )
    torch.testing.assert_close(error, tail, atol=1e-5, rtol=1e-4)
    assert torch.equal(layer.bias, dense.bias)


def test_its_own_weights_load_as_they_are():
    one, other = (LowRankLinear(6, 4, rank=2) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.up, other.up)
    assert torch.equal(one.down, other.down)


def test_a_fresh_product_varies_as_a_dense_layer():
    torch.manual_seed(0)
    layer = LowRankLinear(64, 128, rank=32)
    dense = nn.Linear(64, 128)
    ratio = layer.weight.std() / dense.weight.std()
    assert 0.9 < ratio < 1.1


def test_a_matrix_of_another_shape_is_refused():
    layer = LowRankLinear(6, 4, rank=2)
    with pytest.raises(ValueError, match=r'matrix of \(4, 6\), got \(6, 6\)'):
        layer.load_state_dict(nn.Linear(6, 6).state_dict())


@pytest.mark.parametrize('settings', [dict(rank=5), dict(rank=2, stacked=3)])
def test_ranks_and_stacks_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match='LowRankLinear cannot make'):
        LowRankLinear(6, 4, **settings)


def test_weights_of_a_matrix_are_rank_times_both_sides():
    model = tiny.build(swin())
    dense = sum(one.numel() for one in model.parameters())
    layers = factorize(model, 0.5)
    found = sizes(layers)
    for path, whole, kept in found:
        one = layers[path]
        rows = one.out_features // one.stacked
        assert kept == one.stacked * one.rank * (rows + one.in_features)
        assert kept <= 0.5 * whole or one.rank == 1
    saved = sum(whole - kept for _, whole, kept in found)
    assert saved > 0
    assert sum(one.numel() for one in model.parameters()) == dense - saved


def test_queries_keys_and_values_are_products_of_their_own():
    layers = factorize(tiny.build(swin()), 0.5)
    stacks = {
        path.rpartition('.')[2]: one.stacked for path, one in layers.items()
    }
    assert stacks['qkv'] == 3
    assert set(stacks.values()) == {1, 3}


def test_with_its_full_rank_the_detector_is_what_it_was():
    model = tiny.build(swin()).eval()
    thinned = copy.deepcopy(model)
    factorize(thinned, 'full')
    images, _ = tiny.batch()
    with torch.no_grad():
        for one, other in zip(
            thinned._forward(images), model._forward(images)
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_of_the_whole_one_starts_the_thin_one():
    whole = tiny.build(swin())
    student = tiny.build(thin())
    report = student.load_state_dict(whole.state_dict())
    assert not report.missing_keys
    assert not report.unexpected_keys
    by_hand = copy.deepcopy(whole)
    factorize(by_hand, 0.5)
    for one, other in zip(student.parameters(), by_hand.parameters()):
        torch.testing.assert_close(one, other)


def test_it_is_the_class_that_it_names():
    student = tiny.build(thin())
    assert type(student).__name__ == 'RetinaNet'
    assert isinstance(
        student.backbone.stages[0].blocks[0].attn.w_msa.qkv, LowRankLinear
    )


def test_attention_is_thin_and_offsets_stay_dense():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2)
            self.sampling_offsets = nn.Linear(16, 16)
            self.value_proj = nn.Linear(16, 16)

    block = nn.ModuleDict(dict(neck=Block()))
    assert list(factorize(block, 0.5, 'neck')) == [
        'neck.attn.in_proj',
        'neck.attn.out_proj',
        'neck.value_proj',
    ]


def test_matrices_that_would_not_shrink_stay():
    assert rank_of(1, 64, 0.9) is None
    assert rank_of(64, 64, 0.5) == 16


@pytest.mark.parametrize('ratio', [0, 1.0, -1, float('nan'), 'whole'])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(ValueError, match='rank_ratio'):
        tiny.build(thin(ratio))


def test_a_network_without_matrices_is_refused():
    model = dict(
        tiny.retinanet(), type='mmkd.Factorized', detector='RetinaNet'
    )
    with pytest.raises(ValueError, match='no linear layer of .backbone.'):
        tiny.build(model)


def test_a_part_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'backbone'"):
        tiny.build(thin(parts=('backbon',)))
