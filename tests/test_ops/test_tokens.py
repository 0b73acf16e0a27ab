import math

import pytest
import torch

from mmkd.ops.tokens import mask_overlap, token_masks, tokens_as_map


@pytest.fixture
def masks():
    torch.manual_seed(0)
    return torch.rand(2, 3, 4, 5)


def test_a_mask_is_the_sigmoid_of_the_product_with_each_cell():
    torch.manual_seed(0)
    feature, tokens = torch.randn(2, 5, 3, 4), torch.randn(6, 5)
    masks = token_masks(feature, tokens)
    assert masks.shape == (2, 6, 3, 4)
    for n, t, y, x in [(0, 0, 0, 0), (1, 5, 2, 3), (0, 2, 1, 3)]:
        product = sum(
            feature[n, c, y, x].item() * tokens[t, c].item() for c in range(5)
        )
        expected = 1 / (1 + math.exp(-product))
        assert masks[n, t, y, x].item() == pytest.approx(expected, rel=1e-5)


def test_a_token_of_zeros_sees_half_of_everything():
    masks = token_masks(torch.randn(1, 4, 2, 2), torch.zeros(2, 4))
    assert (masks == 0.5).all()


def test_masks_are_computed_in_float32_whatever_comes_in():
    feature = 300 * torch.ones(1, 8, 2, 2, dtype=torch.float16)
    with torch.autocast('cpu', torch.bfloat16):
        masks = token_masks(feature, torch.full((1, 8), 1e-3))
    assert masks.dtype == torch.float32
    torch.testing.assert_close(
        masks, torch.full((1, 1, 2, 2), 2.4).sigmoid(), rtol=1e-6, atol=0
    )


def test_masks_that_are_the_same_overlap_wholly_and_apart_not_at_all():
    one = torch.rand(2, 1, 4, 5)
    torch.testing.assert_close(
        mask_overlap(one.expand(-1, 3, -1, -1)), torch.tensor(1.0)
    )
    apart = torch.eye(3).view(1, 3, 1, 3)
    assert mask_overlap(apart) == 0


def test_overlap_is_the_mean_dice_of_all_pairs_and_images(masks):
    values = []
    for image in masks.flatten(2):
        for i, j in [(0, 1), (0, 2), (1, 2)]:
            a, b = image[i], image[j]
            both = 2 * (a * b).sum()
            values.append(both / ((a * a).sum() + (b * b).sum()))
    torch.testing.assert_close(mask_overlap(masks), torch.stack(values).mean())


def test_one_mask_alone_overlaps_nothing(masks):
    assert mask_overlap(masks[:, :1]) == 0


def test_masks_that_vanish_are_defined_with_their_gradient():
    masks = torch.zeros(1, 2, 2, 2, requires_grad=True)
    overlap = mask_overlap(masks)
    overlap.backward()
    assert overlap == 0
    assert masks.grad.isfinite().all()


def test_gradient_is_that_of_finite_differences(masks):
    masks = masks[:1, :, :2, :2].double().requires_grad_()
    assert torch.autograd.gradcheck(mask_overlap, masks)


def test_autocast_does_not_lower_the_precision(masks):
    with torch.autocast('cpu', torch.bfloat16):
        cast = mask_overlap(masks)
    assert torch.equal(cast, mask_overlap(masks))


def test_many_cells_in_half_precision_do_not_overflow():
    masks = torch.ones(1, 2, 300, 300, dtype=torch.float16)
    assert mask_overlap(masks) == 1


@pytest.mark.parametrize('shape', [(32, 48), (48, 32), (32, 32)])
def test_tokens_become_the_map_that_they_are_of(shape):
    torch.manual_seed(0)
    feature = torch.randn(2, 3, shape[0] // 8, shape[1] // 8)
    tokens = feature.flatten(2).transpose(1, 2)
    assert torch.equal(tokens_as_map('A loss', tokens, shape), feature)


def test_tokens_of_a_square_need_no_shape_and_a_map_stays_as_it_is():
    square = tokens_as_map('A loss', torch.zeros(1, 9, 2), None)
    assert square.shape == (1, 2, 3, 3)
    feature = torch.zeros(1, 2, 4, 5)
    assert tokens_as_map('A loss', feature, (8, 8)) is feature


@pytest.mark.parametrize('shape', [(1, 10, 4), (9, 4), (1, 0, 4)])
def test_tokens_that_fill_no_batch_are_named(shape):
    with pytest.raises(ValueError, match='A loss takes maps'):
        tokens_as_map('A loss', torch.zeros(shape), (24, 24))
    with pytest.raises(ValueError, match='a square'):
        tokens_as_map('A loss', torch.zeros(shape), None)
