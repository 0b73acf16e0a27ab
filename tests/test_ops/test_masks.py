import math
import random
import time
from fractions import Fraction

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd.ops import masks
from mmkd.ops.masks import (
    background_mask,
    foreground_mask,
    masked_mean,
    require_ground_truth,
    resize_valid,
    union_mask,
    valid_mask,
)
from mmkd.structures import GroundTruth

ALL = (foreground_mask, background_mask, union_mask, valid_mask)


def ground_truth(*boxes, shape=(64, 96), **settings):
    """One list of boxes an image."""
    tensors = [
        torch.tensor(one, dtype=torch.float).view(-1, 4) for one in boxes
    ]
    if 'ignored' in settings:
        settings['ignored'] = [
            torch.tensor(one, dtype=torch.float).view(-1, 4)
            for one in settings['ignored']
        ]
    return GroundTruth.from_boxes(tensors, shape=shape, **settings)


def random_ground_truth(seed, images=3, boxes=6):
    """Boxes inside, across and beyond the border, some of them degenerate."""
    draw = random.Random(seed)
    shape = draw.choice([(64, 96), (100, 70), (37, 53)])

    def box():
        x, y = (draw.uniform(-0.3, 1.1) * side for side in shape[::-1])
        w, h = (draw.uniform(0, 0.6) * side for side in shape[::-1])
        kind = draw.random()
        if kind < 0.2:  # edges on cell borders
            x, y, w, h = (8 * round(value / 8) for value in (x, y, w, h))
        elif kind < 0.3:
            w = 0
        elif kind < 0.4:
            h = -h
        return [x, y, x + w, y + h]

    def several(most):
        return [
            [box() for _ in range(draw.randint(0, most))]
            for _ in range(images)
        ]

    gt = ground_truth(
        *several(boxes),
        shape=shape,
        image_shapes=[
            tuple(draw.randint(1, side) for side in shape)
            for _ in range(images)
        ],
        ignored=several(2),
    )
    return gt, draw.choice([(8, 12), (5, 9), (1, 1), (13, 7)])


# The definitions, cell by cell -------------------------------------------


def cells(box, shape, size, inclusive):
    """First and last row, first and last column; None if nothing is left."""
    (height, width), (rows, columns) = shape, size
    x1, y1, x2, y2 = (Fraction(value) for value in box.tolist())
    if min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
        return None
    last = 0 if inclusive else -1
    return (
        math.floor(y1 * rows / height),
        math.ceil(y2 * rows / height) + last,
        math.floor(x1 * columns / width),
        math.ceil(x2 * columns / width) + last,
    )


def covers(spans, row, column):
    if spans is None:
        return False
    return spans[0] <= row <= spans[1] and spans[2] <= column <= spans[3]


def boxes_of(gt, image):
    return gt.boxes[gt.image == image]


def slow_valid(gt, size, padding=False, ignored=False):
    valid = torch.zeros(gt.num_images, 1, *size)
    for image, (height, width) in enumerate(gt.image_shapes):
        crowd = [
            cells(box, gt.shape, size, inclusive=False)
            for box in gt.ignored[gt.ignored_image == image]
        ]
        for row in range(size[0]):
            for column in range(size[1]):
                inside = (
                    Fraction(row * gt.shape[0], size[0]) < height
                    and Fraction(column * gt.shape[1], size[1]) < width
                )
                free = not any(covers(one, row, column) for one in crowd)
                valid[image, 0, row, column] = (inside or padding) and (
                    free or ignored
                )
    return valid


def slow_foreground(gt, size, **keep):
    valid = slow_valid(gt, size, **keep)
    mask = torch.zeros_like(valid)
    for image in range(gt.num_images):
        for box in boxes_of(gt, image):
            spans = cells(box, gt.shape, size, inclusive=True)
            for row in range(size[0]):
                for column in range(size[1]):
                    if covers(spans, row, column):
                        area = spans[1] - spans[0] + 1
                        area *= spans[3] - spans[2] + 1
                        here = mask[image, 0, row, column]
                        mask[image, 0, row, column] = max(here, 1 / area)
    return mask * valid


def slow_background(gt, size, **keep):
    foreground = slow_foreground(gt, size, **keep)
    mask = slow_valid(gt, size, **keep)
    for image in range(gt.num_images):
        for row in range(size[0]):
            for column in range(size[1]):
                if foreground[image, 0, row, column] > 0:
                    mask[image, 0, row, column] = 0
        if mask[image].sum() > 0:
            mask[image] /= mask[image].sum()
    return mask


def slow_union(gt, size, **keep):
    mask = torch.zeros(gt.num_images, 1, *size)
    for image in range(gt.num_images):
        for box in boxes_of(gt, image):
            spans = cells(box, gt.shape, size, inclusive=False)
            for row in range(size[0]):
                for column in range(size[1]):
                    if covers(spans, row, column):
                        mask[image, 0, row, column] = 1
    return mask * slow_valid(gt, size, **keep)


@pytest.mark.parametrize('seed', range(30))
@pytest.mark.parametrize(
    ('fast', 'slow'),
    [
        (foreground_mask, slow_foreground),
        (background_mask, slow_background),
        (union_mask, slow_union),
        (valid_mask, slow_valid),
    ],
)
def test_equals_the_definition_cell_by_cell(fast, slow, seed):
    gt, size = random_ground_truth(seed)
    keep = dict(padding=seed % 2 == 1, ignored=seed % 3 == 1)
    torch.testing.assert_close(
        fast(gt, size, keep['padding'], keep['ignored']),
        slow(gt, size, **keep),
    )


# By hand -----------------------------------------------------------------


def test_a_box_weighs_one_over_its_cells_with_the_last_ones_included():
    # Stride 16: columns 0.625 to 2.5 become 0 to 3, rows 1.25 to 2.25 1 to 3.
    gt = ground_truth([[10, 20, 40, 36]])
    expected = torch.zeros(4, 6)
    expected[1:4, 0:4] = 1 / 12
    torch.testing.assert_close(foreground_mask(gt, (4, 6))[0, 0], expected)


def test_the_background_shares_one_among_its_cells():
    gt = ground_truth([[10, 20, 40, 36]])
    expected = torch.full((4, 6), 1 / 12)
    expected[1:4, 0:4] = 0
    torch.testing.assert_close(background_mask(gt, (4, 6))[0, 0], expected)


def test_the_union_has_the_cells_that_a_box_overlaps():
    gt = ground_truth([[10, 20, 40, 36], [48, 0, 64, 16]])
    expected = torch.zeros(4, 6)
    expected[1:3, 0:3] = 1
    expected[0, 3] = 1  # ends on cell borders: exactly one cell
    torch.testing.assert_close(union_mask(gt, (4, 6))[0, 0], expected)


def test_where_boxes_overlap_the_smaller_one_counts():
    small, large = [33, 17, 47, 31], [0, 0, 95, 63]
    for boxes in ([small, large], [large, small]):
        mask = foreground_mask(ground_truth(boxes), (4, 6))[0, 0]
        assert mask[1, 2] == pytest.approx(1 / 4)
        assert mask[0, 0] == pytest.approx(1 / 35)  # 5 rows, 7 columns


def test_an_image_smaller_than_its_batch_is_not_stretched():
    # The second image is the upper left quarter; a box fills it.
    gt = ground_truth([], [[0, 0, 48, 32]], image_shapes=[(64, 96), (32, 48)])
    expected = torch.zeros(4, 6)
    expected[0:3, 0:4] = 1 / 12
    torch.testing.assert_close(
        foreground_mask(gt, (4, 6), keep_padding=True)[1, 0], expected
    )
    expected[2], expected[:, 3] = 0, 0  # cells of the border
    torch.testing.assert_close(foreground_mask(gt, (4, 6))[1, 0], expected)
    assert union_mask(gt, (4, 6))[1, 0].nonzero().tolist() == [
        [row, column] for row in (0, 1) for column in (0, 1, 2)
    ]


def test_the_padded_border_is_not_background():
    gt = ground_truth([], image_shapes=[(33, 48)])
    expected = torch.zeros(4, 6)
    expected[:3, :3] = 1 / 9  # a cell that the image reaches into counts
    torch.testing.assert_close(background_mask(gt, (4, 6))[0, 0], expected)
    everywhere = background_mask(gt, (4, 6), keep_padding=True)
    torch.testing.assert_close(everywhere, torch.full((1, 1, 4, 6), 1 / 24))


def test_an_ignored_box_is_neither_foreground_nor_background():
    gt = ground_truth([[0, 0, 15, 15]], ignored=[[[16, 0, 96, 33]]])
    foreground = foreground_mask(gt, (4, 6))[0, 0]
    background = background_mask(gt, (4, 6))[0, 0]
    assert foreground[:3, 1:].sum() == 0
    assert background[:3, 1:].sum() == 0
    assert foreground.nonzero().tolist() == [[0, 0], [1, 0]]
    assert background.sum() == pytest.approx(1)
    kept = foreground_mask(gt, (4, 6), keep_ignored=True)[0, 0]
    assert kept.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_rows_and_columns_scale_apart():
    # Stride 8 down, 32 across.
    mask = union_mask(ground_truth([[32, 8, 64, 32]]), (8, 3))[0, 0]
    expected = torch.zeros(8, 3)
    expected[1:4, 1] = 1
    torch.testing.assert_close(mask, expected)


# What has no cells -------------------------------------------------------


def test_without_boxes_all_is_background():
    gt = ground_truth([], [])
    assert foreground_mask(gt, (4, 6)).sum() == 0
    assert union_mask(gt, (4, 6)).sum() == 0
    torch.testing.assert_close(
        background_mask(gt, (4, 6)), torch.full((2, 1, 4, 6), 1 / 24)
    )


def test_an_image_without_boxes_among_others_is_all_background():
    gt = ground_truth([[0, 0, 95, 63]], [], [[0, 0, 15, 15]])
    assert foreground_mask(gt, (4, 6))[1].sum() == 0
    assert background_mask(gt, (4, 6)).sum((1, 2, 3)).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    'box',
    [
        [-20, 10, 0, 30],
        [96, 10, 120, 30],
        [10, -9, 30, 0],
        [10, 64, 30, 80],
        [10, 10, 10, 30],
        [10, 10, 30, 10],
        [30, 10, 10, 30],
        [math.nan, 10, 30, 30],
        [math.nan] * 4,
    ],
    ids=str,
)
def test_a_box_outside_or_without_area_marks_nothing(box):
    gt = ground_truth([box])
    assert foreground_mask(gt, (4, 6)).sum() == 0
    assert union_mask(gt, (4, 6)).sum() == 0
    assert background_mask(gt, (4, 6)).sum() == pytest.approx(1)


def test_a_box_across_the_border_marks_what_is_inside():
    # Columns -1 to 1 and rows -1 to 1, nine cells, of which four exist.
    mask = foreground_mask(ground_truth([[-16, -16, 16, 16]]), (4, 6))[0, 0]
    assert mask.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert mask[0, 0] == pytest.approx(1 / 9)


# Invariances -------------------------------------------------------------


@pytest.mark.parametrize('make', ALL)
def test_a_transposed_batch_has_transposed_masks(make):
    gt, _ = random_ground_truth(5)
    turned = GroundTruth.from_boxes(
        [boxes_of(gt, n)[:, [1, 0, 3, 2]] for n in range(3)],
        shape=gt.shape[::-1],
        image_shapes=[shape[::-1] for shape in gt.image_shapes],
        ignored=[
            gt.ignored[gt.ignored_image == n][:, [1, 0, 3, 2]]
            for n in range(3)
        ],
    )
    torch.testing.assert_close(
        make(gt, (8, 12)), make(turned, (12, 8)).transpose(2, 3)
    )


@pytest.mark.parametrize('make', ALL)
def test_chunks_of_boxes_do_not_change_the_result(make, monkeypatch):
    gt, size = random_ground_truth(4, boxes=20)
    whole = make(gt, size)
    monkeypatch.setattr(masks, 'CHUNK', 1)
    torch.testing.assert_close(make(gt, size), whole)


def test_the_order_of_boxes_does_not_matter():
    gt, size = random_ground_truth(6, images=1, boxes=9)
    turned = GroundTruth.from_boxes([gt.boxes.flip(0)], shape=gt.shape)
    torch.testing.assert_close(
        foreground_mask(gt, size, True, True), foreground_mask(turned, size)
    )


def test_half_precision_boxes_give_the_masks_of_their_values():
    gt = ground_truth([[10, 20, 40, 36]])
    half = GroundTruth.from_boxes([gt.boxes.half()], shape=gt.shape)
    torch.testing.assert_close(
        foreground_mask(half, (4, 6)), foreground_mask(gt, (4, 6))
    )


# Cost --------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('make', ALL)
def test_more_boxes_are_no_more_operators(make):
    counts = []
    for boxes in (1, 40):
        gt = ground_truth(
            [[0, 0, 9, 9]] * boxes, ignored=[[[0, 0, 9, 9]] * boxes]
        )
        with Calls() as calls:
            make(gt, (8, 12))
        counts.append(calls.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize('make', ALL)
def test_no_value_is_read_back_from_the_device(make):
    with FakeTensorMode():  # raises where a step depends on a value
        gt = GroundTruth.from_boxes(
            [torch.rand(3, 4), torch.rand(0, 4)],
            shape=(64, 96),
            image_shapes=[(64, 80), (48, 96)],
            ignored=[torch.rand(0, 4), torch.rand(2, 4)],
        )
        assert make(gt, (8, 12)).shape == (2, 1, 8, 12)


def test_five_hundred_boxes_on_a_large_map_cost_little():
    corner = torch.rand(500, 2) * 600
    boxes = torch.cat([corner, corner + 8 + 200 * torch.rand(500, 2)], 1)
    gt = GroundTruth.from_boxes(boxes.split(250), shape=(800, 1344))
    peak = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal peak
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                peak = max(peak, out.untyped_storage().nbytes())
            return out

    with Largest():
        foreground_mask(gt, (100, 168))
    assert peak <= 4 * masks.CHUNK  # not the 34 MB of all boxes at once
    start = time.process_time()
    foreground_mask(gt, (100, 168))
    assert time.process_time() - start < 2  # 0.02 s where it was written


# Messages ----------------------------------------------------------------


def test_missing_ground_truth_says_what_to_pass():
    with pytest.raises(ValueError, match=r'FGDLoss .* got gt=None. Call it'):
        require_ground_truth('FGDLoss', None, torch.zeros(2, 8, 4, 6))


def test_ground_truth_of_another_batch_is_refused():
    with pytest.raises(ValueError, match=r'has 2, gt has 1'):
        require_ground_truth(
            'FGDLoss', ground_truth([]), torch.zeros(2, 8, 4, 6)
        )


def test_a_smaller_map_averages_the_cells_that_count():
    torch.manual_seed(0)
    feature = torch.randn(1, 2, 4, 6)
    valid = torch.ones(1, 1, 4, 6)
    valid[..., 3:, :] = 0
    valid[..., 4:] = 0
    found = resize_valid(feature, valid, (2, 3))
    expected = torch.zeros(1, 2, 2, 3)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = slice(2 * row, min(2 * row + 2, 3))
        cells = feature[..., rows, 2 * column : 2 * column + 2]
        expected[..., row, column] = cells.mean((2, 3))
    torch.testing.assert_close(found, expected)


def test_a_map_smaller_in_one_direction_averages_as_well():
    torch.manual_seed(0)
    feature, ones = torch.randn(1, 2, 4, 6), torch.ones(1, 1, 4, 6)
    expected = feature.unflatten(3, (2, 3)).mean(4)
    torch.testing.assert_close(resize_valid(feature, ones, (4, 2)), expected)


def test_a_larger_map_is_not_pulled_down_by_its_border():
    feature = torch.tensor([5.0, 5, 7]).expand(1, 1, 3, 3)
    valid = torch.tensor([1.0, 1, 0]).expand(1, 1, 3, 3)
    found = resize_valid(feature, valid, (6, 6))
    torch.testing.assert_close(found[..., :5], torch.full((1, 1, 6, 5), 5.0))
    assert (found[..., 5:] == 0).all()


def test_a_map_of_that_size_loses_its_border_alone():
    torch.manual_seed(0)
    feature = torch.randn(1, 2, 3, 3)
    valid = (torch.rand(1, 1, 3, 3) > 0.5).float()
    assert torch.equal(resize_valid(feature, valid, (3, 3)), feature * valid)


def test_a_mean_over_cells_that_count_is_zero_without_any():
    feature = torch.arange(8.0).view(2, 1, 2, 2)
    valid = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]]).view(2, 1, 2, 2)
    assert masked_mean(feature, valid).tolist() == [[1.0], [0.0]]
