import math
import random

import pytest
import torch

from mmkd.ops.masks import union_mask, valid_mask
from mmkd.ops.scores import (
    bernoulli_divergence,
    cell_labels,
    cell_samples,
    check_class_maps,
    class_probs,
    class_samples,
    image_samples,
    labelled_samples,
    target_and_others,
    top_score,
    valid_samples,
)
from mmkd.structures import GroundTruth

SHAPE = (32, 48)


def ground_truth(*boxes, labels=None, **settings):
    """One list of boxes an image; their labels count up from 0."""
    tensors = [torch.tensor(one).float().view(-1, 4) for one in boxes]
    if labels is None:
        start, labels = 0, []
        for one in tensors:
            labels.append(torch.arange(start, start + len(one)))
            start += len(one)
    return GroundTruth.from_boxes(
        tensors, shape=SHAPE, labels=labels, **settings
    )


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 6, *size) for size in ((4, 6), (2, 3)))


# Samples ---------------------------------------------------------------------


def test_a_row_holds_the_classes_of_one_anchor_of_one_cell(pyramid):
    rows = iter(class_samples(pyramid, 3))
    for level in pyramid:
        for image in level:
            for y in range(level.shape[2]):
                for x in range(level.shape[3]):
                    for anchor in range(2):
                        expected = [
                            image[3 * anchor + c, y, x] for c in range(3)
                        ]
                        assert torch.equal(next(rows), torch.stack(expected))
    assert next(rows, None) is None


def test_without_a_number_of_classes_a_cell_is_one_row(pyramid):
    rows = class_samples(pyramid)
    assert rows.shape == (2 * 4 * 6 + 2 * 2 * 3, 6)
    torch.testing.assert_close(rows[7], pyramid[0][0, :, 1, 1])


@pytest.mark.parametrize('num_classes', [None, 6, 3, 2])
def test_a_cells_value_stands_at_each_of_its_anchors(pyramid, num_classes):
    """Maps whose channels all hold the value of their cell tell the order."""
    cells = [one[:, :1] for one in pyramid]
    maps = [one.expand(-1, 6, -1, -1) for one in cells]
    vector = cell_samples(cells, maps, num_classes)
    assert torch.equal(vector, class_samples(maps, num_classes)[:, 0])


@pytest.mark.parametrize('num_classes', [3, None])
def test_samples_of_an_image_are_those_of_its_own_maps(pyramid, num_classes):
    found = image_samples(
        class_samples(pyramid, num_classes), pyramid, num_classes
    )
    assert len(found) == len(pyramid[0]) > 1
    for index, samples in enumerate(found):
        own = [one[index : index + 1] for one in pyramid]
        assert torch.equal(samples, class_samples(own, num_classes))


def test_half_precision_is_widened():
    maps = [torch.zeros(1, 4, 2, 2, dtype=torch.half)]
    assert class_samples(maps, 2).dtype == torch.float32


def test_samples_in_the_padded_border_do_not_count(pyramid):
    gt = ground_truth([], [], image_shapes=[SHAPE, (16, 24)])
    student, teacher, valid = valid_samples('L', pyramid, pyramid, gt, 3)
    assert torch.equal(student, class_samples(pyramid, 3))
    assert torch.equal(student, teacher)
    masks = [valid_mask(gt, tuple(one.shape[-2:])) for one in pyramid]
    assert torch.equal(valid, cell_samples(masks, pyramid, 3))
    assert valid.sum() == 2 * (24 + 6 + 6 + 2)  # two anchors
    *_, valid = valid_samples('L', pyramid, pyramid, gt, 3, keep_padding=True)
    assert valid.all()


def test_samples_in_ignored_boxes_do_not_count(pyramid):
    ignored = [torch.tensor([[0.0, 0, 16, 8]]), torch.zeros(0, 4)]
    gt = ground_truth([], [], ignored=ignored)
    *_, valid = valid_samples('L', pyramid, pyramid, gt)
    assert (1 - valid).sum() == 2 + 1
    *_, valid = valid_samples('L', pyramid, pyramid, gt, keep_ignored=True)
    assert valid.all()


def test_labels_stand_at_the_samples_of_their_cells(pyramid):
    gt = ground_truth([[8, 8, 16, 24]], [[16, 16, 48, 32]])
    *logits, labels = labelled_samples('L', pyramid, pyramid, gt, 3)
    maps = [cell_labels(gt, tuple(one.shape[-2:])) for one in pyramid]
    assert torch.equal(labels, cell_samples(maps, pyramid, 3))
    assert all(torch.equal(one, class_samples(pyramid, 3)) for one in logits)
    assert labels.dtype == torch.long


def test_labels_obey_padding_and_ignored_boxes(pyramid):
    ignored = [torch.tensor([[0.0, 0, 8, 8]]), torch.zeros(0, 4)]
    gt = ground_truth(
        [[0, 0, 48, 32]],
        [[0, 0, 48, 32]],
        image_shapes=[SHAPE, (16, 24)],
        ignored=ignored,
    )
    fine = pyramid[:1]

    def counted(**settings):
        *_, labels = labelled_samples('L', fine, fine, gt, **settings)
        return (labels >= 0).sum()

    assert counted() == 23 + 6
    assert counted(keep_padding=True) == 23 + 24
    assert counted(keep_ignored=True) == 24 + 6


# Labels of cells -------------------------------------------------------------


def literal_labels(gt, size, valid):
    """For each cell, a loop over the boxes that overlap it."""
    result = torch.full((gt.num_images, 1, *size), -1)
    high, wide = gt.shape[0] / size[0], gt.shape[1] / size[1]
    for n in range(gt.num_images):
        for y in range(size[0]):
            for x in range(size[1]):
                best = math.inf
                for box, label, image in zip(
                    gt.boxes.tolist(), gt.labels.tolist(), gt.image.tolist()
                ):
                    x1, y1, x2, y2 = box
                    area = (x2 - x1) * (y2 - y1)
                    overlaps = (
                        max(x1, x * wide) < min(x2, (x + 1) * wide)
                        and max(y1, y * high) < min(y2, (y + 1) * high)
                        and x1 < x2
                        and y1 < y2
                    )
                    inside = image == n and overlaps and valid[n, 0, y, x] > 0
                    if inside and area <= best:
                        best, result[n, 0, y, x] = area, label
    return result


@pytest.mark.parametrize('seed', range(8))
def test_labels_equal_a_literal_loop_over_boxes(seed):
    draw = random.Random(seed)

    def box():
        x, y = draw.uniform(-10, 40), draw.uniform(-10, 30)
        wide, high = draw.choice([0, 4, 11, 25, 40]), draw.choice([3, 9, 20])
        return [x, y, x + wide, y + high]

    gt = ground_truth(
        *([box() for _ in range(draw.randint(0, 7))] for _ in range(3)),
        image_shapes=[SHAPE, (20, 48), (32, 30)],
        ignored=[torch.tensor([[20.0, 4, 26, 12]])] * 3,
    )
    for size in ((8, 12), (4, 6), (2, 3)):
        valid = valid_mask(gt, size)
        assert torch.equal(
            cell_labels(gt, size), literal_labels(gt, size, valid)
        )


def test_cells_with_a_label_are_those_of_the_union():
    gt = ground_truth(
        [[3, 3, 20, 9], [30, 2, 31, 30]],
        [[40, 20, 60, 40]],
        image_shapes=[SHAPE, (30, 44)],
    )
    for keep in (False, True):
        labels = cell_labels(gt, (4, 6), keep_padding=keep)
        assert torch.equal(
            (labels >= 0).float(), union_mask(gt, (4, 6), keep_padding=keep)
        )


def test_the_smallest_box_wins_in_any_order():
    boxes = [[0, 0, 48, 32], [8, 8, 32, 24], [16, 8, 24, 16]]
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        gt = ground_truth(
            [boxes[index] for index in order], labels=[torch.tensor(order)]
        )
        assert cell_labels(gt, (4, 6))[0, 0].tolist() == [
            [0, 0, 0, 0, 0, 0],
            [0, 1, 2, 1, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0],
        ]


def test_of_equal_boxes_the_last_counts():
    gt = ground_truth([[0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 8, 8]])
    assert cell_labels(gt, (4, 6))[0, 0, 0, 0] == 2


def test_without_boxes_there_is_no_label():
    assert (cell_labels(ground_truth([], []), (4, 6)) == -1).all()


# Probabilities ---------------------------------------------------------------


def test_probabilities_are_those_of_the_activation():
    logits = torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(
        class_probs(logits, 'sigmoid'), torch.tensor([[0.5, 0.75]])
    )
    torch.testing.assert_close(
        class_probs(logits, 'softmax'), torch.tensor([[0.25, 0.75]])
    )


def test_the_background_has_no_score():
    logits = torch.tensor([[3.0, 2.0, 1.0, 4.0]]).log()  # softmax: tenths
    for activation, background, expected in (
        ('softmax', True, 0.3),
        ('softmax', False, 0.4),
        ('sigmoid', True, 0.8),  # 4 / (1 + 4)
        ('sigmoid', False, 0.8),
    ):
        torch.testing.assert_close(
            top_score(logits, activation, background), torch.tensor([expected])
        )


def test_divergence_of_two_coins_by_hand():
    # 3/4 against 1/2.
    value = bernoulli_divergence(
        torch.tensor(0.0), torch.tensor(3.0).log()
    ).item()
    assert value == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_divergence_keeps_its_digits_at_both_ends():
    """Close logits far out: the literal sum in double precision."""
    for teacher in (-14.0, -9.0, 9.0, 14.0):
        p, q = (1 / (1 + math.exp(-x)) for x in (teacher, teacher + 0.1))
        p_no, q_no = (1 / (1 + math.exp(x)) for x in (teacher, teacher + 0.1))
        expected = p * math.log(p / q) + p_no * math.log(p_no / q_no)
        value = bernoulli_divergence(
            torch.tensor(teacher + 0.1), torch.tensor(teacher)
        )
        assert value.item() == pytest.approx(expected, rel=1e-3)


def test_gradient_of_the_divergence_is_the_difference_of_probabilities():
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 50)
    student.requires_grad_()
    bernoulli_divergence(student, teacher).sum().backward()
    torch.testing.assert_close(
        student.grad, student.sigmoid().detach() - teacher.sigmoid()
    )


@pytest.mark.parametrize('label', [0, 1, 2])
def test_target_and_others_by_a_literal_softmax(label):
    logits = [0.3, -1.2, 2.0]
    weights = [math.exp(one) for one in logits]
    rest = sum(weights) - weights[label]
    margin, others = target_and_others(
        torch.tensor([logits]), torch.tensor([label])
    )
    assert margin.sigmoid().item() == pytest.approx(
        weights[label] / sum(weights)
    )
    for index, weight in enumerate(weights):
        expected = 0 if index == label else math.log(weight / rest)
        assert others[0, index].item() == pytest.approx(expected, abs=1e-6)


def test_extreme_targets_have_finite_gradients():
    logits = 300 * torch.tensor([[1.0, -1, -1], [-1, 1, 1], [0, 0, 0]])
    logits.requires_grad_()
    margin, others = target_and_others(logits, torch.tensor([0, 0, -1]))
    assert margin.isfinite().all()
    assert others.isfinite().all()
    (margin.sum() + others.exp().sum()).backward()
    assert logits.grad.isfinite().all()


# Messages --------------------------------------------------------------------


def test_channels_that_are_no_whole_anchors_are_named(pyramid):
    with pytest.raises(
        ValueError, match=r'MyLoss .* num_classes=4 and a map \(2, 6, 4, 6\)'
    ):
        check_class_maps('MyLoss', pyramid, pyramid, 4)
    with pytest.raises(ValueError, match='num_classes=0'):
        check_class_maps('MyLoss', pyramid, pyramid, 0)
    check_class_maps('MyLoss', pyramid, pyramid, 6)


def test_heads_of_other_anchors_or_classes_are_named(pyramid):
    other = tuple(one[:, :3] for one in pyramid)
    with pytest.raises(
        ValueError, match=r'MyLoss .* 6 channels of the student and 3 of'
    ):
        check_class_maps('MyLoss', pyramid, other)


def test_levels_that_do_not_pair_are_named(pyramid):
    with pytest.raises(ValueError, match=r'2 levels of the student and 1'):
        check_class_maps('MyLoss', pyramid, pyramid[:1])
    with pytest.raises(ValueError, match='ResizeAdapt'):
        check_class_maps('MyLoss', pyramid, pyramid[::-1])


@pytest.mark.parametrize('samples', [valid_samples, labelled_samples])
def test_samples_need_ground_truth_and_maps_that_fit(samples, pyramid):
    with pytest.raises(ValueError, match=r'MyLoss .* gt=None'):
        samples('MyLoss', pyramid, pyramid, None)
    gt = ground_truth([], [])
    with pytest.raises(ValueError, match='num_classes=4'):
        samples('MyLoss', pyramid, pyramid, gt, 4)


def test_a_single_class_has_no_others(pyramid):
    gt = ground_truth([], [])
    with pytest.raises(ValueError, match=r'MyLoss .* SoftTargetLoss'):
        labelled_samples('MyLoss', pyramid, pyramid, gt, 1)
    single = tuple(one[:, :1] for one in pyramid)
    with pytest.raises(ValueError, match='SoftTargetLoss'):
        labelled_samples('MyLoss', single, single, gt)
