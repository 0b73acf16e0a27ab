import math

import pytest
import torch

from mmkd.losses.fgd_focal import FGDFocalLoss, fgd_focal_loss
from mmkd.ops.masks import background_mask, foreground_mask
from mmkd.structures import GroundTruth

UNIT = dict(foreground_weight=1, background_weight=1, attention_weight=1)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 3, 4, 6).unbind()


@pytest.fixture
def gt():
    return GroundTruth.from_boxes(
        [
            torch.tensor([[10.0, 20, 40, 36], [0, 0, 20, 40]]),
            torch.zeros(0, 4),
        ],
        shape=(64, 96),
        image_shapes=[(64, 96), (40, 80)],
    )


def softmax(values, temperature):
    total = sum(math.exp(value / temperature) for value in values)
    return [math.exp(value / temperature) / total for value in values]


def slow_attentions(feature, temperature):
    """Of one image, by the paper's equations; (H, W) and (C,) lists."""
    channels, height, width = feature.shape
    spatial = softmax(
        [
            sum(abs(feature[c, y, x].item()) for c in range(channels))
            / channels
            for y in range(height)
            for x in range(width)
        ],
        temperature,
    )
    channel = softmax(
        [
            sum(
                abs(feature[c, y, x].item())
                for y in range(height)
                for x in range(width)
            )
            / (height * width)
            for c in range(channels)
        ],
        temperature,
    )
    return (
        [height * width * value for value in spatial],
        [channels * value for value in channel],
    )


def slow_parts(student, teacher, masks, temperature):
    """The paper's sums, one element at a time."""
    images, channels, height, width = student.shape
    totals = [0.0, 0.0, 0.0]
    for n in range(images):
        space, channel = slow_attentions(teacher[n], temperature)
        own_space, own_channel = slow_attentions(student[n], temperature)
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    gap = (student[n, c, y, x] - teacher[n, c, y, x]).item()
                    error = space[y * width + x] * channel[c] * gap**2
                    for part in (0, 1):
                        mask = masks[part][n, 0, y, x].item()
                        totals[part] += mask * error / images
        for ours, theirs in ((own_space, space), (own_channel, channel)):
            totals[2] += sum(abs(a - b) for a, b in zip(ours, theirs)) / images
    return dict(zip(('foreground', 'background', 'attention'), totals))


@pytest.mark.parametrize('temperature', [0.5, 0.8])
def test_equals_the_formulas_element_by_element(maps, gt, temperature):
    masks = foreground_mask(gt, (4, 6)), background_mask(gt, (4, 6))
    parts = FGDFocalLoss(**UNIT, temperature=temperature)(*maps, gt)
    expected = slow_parts(*maps, masks, temperature)
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-5), name


def test_gradient_equals_that_of_the_weighted_copies(maps, gt):
    # What the paper writes: both maps under the root of every weight.
    student, teacher = (one.double() for one in maps)
    masks = [
        make(gt, (4, 6)).double()
        for make in (foreground_mask, background_mask)
    ]

    def attention(feature, dims, temperature=0.5):
        strength = feature.abs().mean(dims, keepdim=True)
        flat = (strength / temperature).flatten(1).softmax(1)
        return flat.shape[1] * flat.view_as(strength)

    student.requires_grad_()
    space, channel = attention(teacher, 1), attention(teacher, (2, 3))
    total = sum(
        ((student - teacher) * (mask * space * channel).sqrt()).square().sum()
        for mask in masks
    )
    total = total + (attention(student, 1) - space).abs().sum()
    total = total + (attention(student, (2, 3)) - channel).abs().sum()
    expected = torch.autograd.grad(total / 2, student)[0]
    parts = FGDFocalLoss(**UNIT)(student, teacher, gt)
    actual = torch.autograd.grad(sum(parts.values()), student)[0]
    torch.testing.assert_close(actual, expected)


def test_a_small_object_weighs_as_much_as_a_large_one():
    # A flat teacher has attention 1 everywhere: what is left is C * 1.
    teacher = torch.ones(1, 3, 8, 8)
    for box in ([1.0, 1, 7, 7], [9.0, 9, 55, 47]):
        gt = GroundTruth.from_boxes([torch.tensor([box])], shape=(64, 64))
        parts = FGDFocalLoss(**UNIT)(teacher + 1, teacher, gt)
        assert parts['foreground'].item() == pytest.approx(3)
        assert parts['background'].item() == pytest.approx(3)


def test_equal_maps_cost_nothing(maps, gt):
    student, _ = maps
    parts = FGDFocalLoss()(student, student.clone(), gt)
    assert [part.item() for part in parts.values()] == [0, 0, 0]


def test_swapping_rows_and_columns_changes_nothing(maps, gt):
    turned = GroundTruth.from_boxes(
        [gt.boxes[gt.image == n][:, [1, 0, 3, 2]] for n in range(2)],
        shape=gt.shape[::-1],
        image_shapes=[shape[::-1] for shape in gt.image_shapes],
    )
    torch.testing.assert_close(
        FGDFocalLoss(**UNIT)(*maps, gt),
        FGDFocalLoss(**UNIT)(*(one.transpose(2, 3) for one in maps), turned),
    )


def test_the_padded_border_counts_only_on_demand(maps, gt):
    student, teacher = maps
    changed = student.clone()
    changed[1, :, 3:] += 1  # below the second image
    for keep in (False, True):
        loss = FGDFocalLoss(keep_padding=keep)
        before, after = (
            loss(one, teacher, gt)['background'] for one in (student, changed)
        )
        assert (before != after).item() is keep


def test_each_part_is_scaled_by_its_weight(maps, gt):
    plain = FGDFocalLoss(**UNIT)(*maps, gt)
    scaled = FGDFocalLoss(2, 3, 5, loss_weight=7)(*maps, gt)
    for name, factor in dict(foreground=2, background=3, attention=5).items():
        torch.testing.assert_close(scaled[name], 7 * factor * plain[name])


def test_the_batch_is_averaged(maps, gt):
    twice = GroundTruth.from_boxes(
        [gt.boxes[gt.image == n] for n in (0, 1, 0, 1)],
        shape=gt.shape,
        image_shapes=gt.image_shapes * 2,
    )
    torch.testing.assert_close(
        FGDFocalLoss()(*(torch.cat([one, one]) for one in maps), twice),
        FGDFocalLoss()(*maps, gt),
    )


def test_half_precision_does_not_overflow():
    gt = GroundTruth.from_boxes(
        [torch.tensor([[10.0, 20, 40, 36]]), torch.zeros(0, 4)], shape=(64, 96)
    )
    student = torch.full((2, 3, 4, 6), 600.0, dtype=torch.half)
    with torch.autocast('cpu', torch.bfloat16):
        parts = FGDFocalLoss(**UNIT)(student, -student, gt)
    # Flat maps, so attention 1; one of two images has a box.
    assert parts['foreground'].item() == pytest.approx(3 * 1200**2 / 2)
    assert parts['background'].item() == pytest.approx(3 * 1200**2)


def test_the_function_takes_any_masks(maps):
    student, teacher = maps
    mask = torch.rand(2, 1, 4, 6)
    parts = fgd_focal_loss(student, teacher, mask, 2 * mask)
    torch.testing.assert_close(parts['background'], 2 * parts['foreground'])


def test_missing_ground_truth_is_named(maps):
    with pytest.raises(ValueError, match=r'FGDFocalLoss .* gt=None'):
        FGDFocalLoss()(*maps)
