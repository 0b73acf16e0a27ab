import math

import pytest
import torch
from scipy.stats import rankdata

from mmkd.ops.ranks import soft_rank


@pytest.fixture
def values():
    torch.manual_seed(0)
    return torch.randn(5, 7)


def test_equals_a_literal_sum_over_pairs(values):
    ranks = soft_rank(values, eps=0.3)
    for row, found in zip(values.tolist(), ranks.tolist()):
        expected = [
            0.5 + sum(1 / (1 + math.exp((b - a) / 0.3)) for b in row)
            for a in row
        ]
        assert found == pytest.approx(expected, rel=1e-5)


def test_becomes_the_rank_as_the_softness_falls(values):
    values[:, 3] = values[:, 0]  # of equal ones both have the mean rank
    expected = torch.tensor(rankdata(values.numpy(), axis=1)).float()
    errors = [
        (soft_rank(values, eps) - expected).abs().max().item()
        for eps in (1.0, 0.1, 1e-2, 1e-4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 1e-5


def test_becomes_linear_in_the_values_as_it_grows(values):
    """The derivative of a sigmoid at 0 is a quarter."""
    eps = 100.0
    slope = values.shape[1] / (4 * eps)
    expected = 4 + slope * (values - values.mean(1, keepdim=True))
    torch.testing.assert_close(
        soft_rank(values, eps), expected, rtol=0, atol=1e-5
    )


def test_the_sum_of_ranks_is_that_of_whole_numbers(values):
    for eps in (1e-3, 0.1, 10.0):
        torch.testing.assert_close(
            soft_rank(values, eps).sum(1), torch.full((5,), 7 * 8 / 2)
        )


def test_reversed_values_have_reversed_ranks(values):
    torch.testing.assert_close(soft_rank(-values), 8 - soft_rank(values))


def test_an_offset_changes_nothing_and_a_scale_is_a_softness(values):
    torch.testing.assert_close(
        soft_rank(3 * values + 5, 0.3), soft_rank(values, 0.1)
    )


def test_only_the_last_axis_is_ranked(values):
    stacked = torch.stack([values, values.flip(0)])
    torch.testing.assert_close(
        soft_rank(stacked)[1], soft_rank(values).flip(0)
    )


def test_gradient_is_that_of_finite_differences(values):
    values = values[:2, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_rank(x, 0.5), values)


def test_half_precision_is_ranked_in_float32():
    values = torch.arange(300).half()
    assert torch.equal(soft_rank(values, 1e-2), torch.arange(1.0, 301.0))
