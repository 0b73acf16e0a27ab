import pytest
import torch

from mmkd.ops.numeric import (
    as_float,
    full_precision,
    standardise,
    unit,
    zero_of,
    zscore,
)


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_widened_and_double_kept(given, expected):
    assert as_float(torch.zeros(1, dtype=given)).dtype == expected


def test_products_stay_exact_inside_autocast():
    x = torch.full((2, 2), 1 + 2**-10)  # bfloat16 keeps 8 bits of it
    with torch.autocast('cpu', torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x)[0, 0] == 2 * (1 + 2**-10) ** 2


def test_zero_has_a_zero_gradient_even_to_a_broken_map():
    feature = torch.full((1, 2, 3, 3), torch.nan, dtype=torch.float16)
    feature.requires_grad_()
    zero = zero_of(feature)
    zero.backward()
    assert zero == 0
    assert zero.dtype == torch.float32
    assert (feature.grad == 0).all()


def test_standardised_channels_have_mean_zero_and_deviation_one():
    torch.manual_seed(0)
    feature = 7 * torch.randn(3, 4, 5, 6) + torch.arange(4.0).view(4, 1, 1)
    channels = standardise(feature, 1e-6).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(4))
    torch.testing.assert_close(channels.square().mean(1), torch.ones(4))


def test_a_channel_is_standardised_over_all_images_by_hand():
    feature = torch.tensor([1.0, 1.0, 3.0, 3.0]).view(2, 1, 1, 2)
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(2, 1, 1, 2)
    torch.testing.assert_close(standardise(feature, 0.0), expected)


def test_z_scores_have_mean_zero_and_deviation_one_in_the_last_axis():
    torch.manual_seed(0)
    vectors = 7 * torch.randn(3, 4, 50) + 1000
    scores = zscore(vectors)
    torch.testing.assert_close(
        scores.sum(2), torch.zeros(3, 4), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(scores.square().mean(2), torch.ones(3, 4))
    torch.testing.assert_close(
        zscore(3 * vectors - 5), scores, atol=1e-3, rtol=0
    )


def test_the_mean_product_of_z_scores_is_the_correlation():
    torch.manual_seed(0)
    one, other = torch.randn(2, 9)
    torch.testing.assert_close(
        (zscore(one) * zscore(other)).mean(),
        torch.corrcoef(torch.stack([one, other]))[0, 1],
    )


@pytest.mark.parametrize('height', [0.0, 0.1, -1234.567, 3e4])
def test_a_flat_vector_has_no_z_scores_and_no_gradient(height):
    """Whatever its height: the mean of equal numbers may be rounded."""
    vectors = torch.full((1, 80), height).requires_grad_()
    scores = zscore(vectors)
    (scores * torch.randn(1, 80)).sum().backward()
    assert (scores == 0).all()
    assert (vectors.grad == 0).all()


def test_what_deviates_less_than_the_bound_is_flat():
    vectors = torch.tensor([1.0, 2.0, 3.0])  # from the mean, length sqrt(2)
    assert (zscore(vectors, eps=1.42) == 0).all()
    assert (zscore(vectors, eps=1.41)[[0, 2]] != 0).all()


def test_unit_vectors_have_length_one_along_their_dimension():
    torch.manual_seed(0)
    vectors = torch.randn(3, 4, 5)
    for dim in range(3):
        torch.testing.assert_close(
            unit(vectors, dim), torch.nn.functional.normalize(vectors, dim=dim)
        )


def test_a_vector_without_direction_stays_zero_and_has_no_gradient():
    vectors = torch.tensor([[0.0, 0], [1e-7, 0], [0, 5]], requires_grad=True)
    result = unit(vectors, dim=1)
    assert result.tolist() == [[0, 0], [0, 0], [0, 1]]
    (result * torch.tensor([3.0, 7.0])).sum().backward()
    assert (vectors.grad[:2] == 0).all()
    torch.testing.assert_close(vectors.grad[2], torch.tensor([3 / 5, 0]))


def test_unit_has_the_gradient_of_finite_differences():
    torch.manual_seed(0)
    vectors = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: unit(v, 1), vectors)
