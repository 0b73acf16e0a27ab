import pytest
import torch

from mmkd.ops.wavelets import HAAR, haar, unhaar

SIZES = [(8, 16), (7, 10), (1, 1), (5, 3)]


def energy(*maps):
    return sum(one.square().sum() for one in maps)


def test_the_transform_is_orthonormal_and_its_own_inverse():
    matrix = torch.tensor(HAAR)
    assert torch.equal(matrix @ matrix.T, torch.eye(4))
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('scales', [1, 3])
def test_nothing_is_lost(size, scales):
    feature = torch.randn(2, 3, *size)
    low, highs = haar(feature, scales)
    assert len(highs) == scales
    torch.testing.assert_close(energy(low, *highs), energy(feature))
    torch.testing.assert_close(unhaar(low, highs, size), feature)


def test_a_square_by_hand():
    low, (high,) = haar(torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]]), 1)
    assert low.flatten().tolist() == [7.5]
    # Left minus right, upper minus lower, and one diagonal minus the other.
    assert high.flatten().tolist() == [-2.5, -4.5, 1.5]


def test_bands_stand_where_their_squares_do():
    feature = torch.zeros(1, 2, 4, 6)
    feature[0, 1, 2:, 4:] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    low, (high,) = haar(feature, 1)
    assert (low == 0).all()
    expected = torch.zeros(1, 2, 3, 2, 3)
    expected[0, 1, 0, 1, 2] = 2
    assert torch.equal(high, expected)


def test_the_coarse_band_is_split_again():
    feature = torch.randn(1, 2, 8, 8)
    low, highs = haar(feature, 1)
    lower, (second,) = haar(low, 1)
    twice = haar(feature, 2)
    torch.testing.assert_close(twice[0], lower)
    torch.testing.assert_close(twice[1][0], highs[0])
    torch.testing.assert_close(twice[1][1], second)


def test_odd_sizes_are_filled_up_with_zeros():
    feature = torch.randn(1, 1, 3, 5)
    filled = torch.zeros(1, 1, 4, 6)
    filled[..., :3, :5] = feature
    for one, other in zip(haar(feature, 1)[1], haar(filled, 1)[1]):
        assert torch.equal(one, other)


def test_it_is_computed_in_float32_whatever_comes_in():
    feature = 300 * torch.randn(1, 4, 8, 8).half()
    with torch.autocast('cpu', torch.bfloat16):
        low, highs = haar(feature, 2)
        again = unhaar(low, highs, (8, 8))
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, feature.float())
