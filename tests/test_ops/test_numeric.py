import pytest
import torch

from mmkd.ops.numeric import (
    as_float,
    full_precision,
    standardise,
    unit,
    zero_of,
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
