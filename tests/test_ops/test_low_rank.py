import pytest
import torch

from mmkd.ops.low_rank import truncated


def test_full_rank_is_the_matrix_itself():
    weight = torch.randn(5, 7, dtype=torch.float64)
    up, down = truncated(weight, 5)
    assert up.shape == (5, 5)
    assert down.shape == (5, 7)
    torch.testing.assert_close(up @ down, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rank', [1, 3, 6])
def test_what_is_missing_is_the_tail_of_the_singular_values(rank):
    weight = torch.randn(9, 6)
    up, down = truncated(weight, rank)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    torch.testing.assert_close(
        torch.linalg.norm(weight - up @ down), tail, atol=1e-5, rtol=1e-4
    )


def test_both_matrices_are_of_one_size():
    up, down = truncated(torch.randn(9, 6), 4)
    torch.testing.assert_close(
        up.square().sum(0), down.square().sum(1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize('rank', [0, 7])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(ValueError, match='rank from 1 to 6'):
        truncated(torch.randn(9, 6), rank)
