"""What boxes mark, whatever boxes: held against a look at each cell."""

import dataclasses
import math

import odd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from mmkd.ops.masks import (
    background_mask,
    foreground_mask,
    union_mask,
    valid_mask,
)
from mmkd.ops.regions import region_vectors

quick = settings(
    derandomize=True,
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
thorough = settings(quick, max_examples=2000)
#: Seen cell by cell in Python: thousands of boxes are a case of their own.
FEW = odd.cases(few=True)
MANY = odd.Case(boxes=('many', 'none', 'nested'), cells=(3, 16))


def owned(gt, boxes, image):
    """Each image's boxes, as lists."""
    return [boxes[image == index].tolist() for index in range(gt.num_images)]


def extent(low, high, whole, cells):
    """Where a box begins and ends, in cells; None if it shows nothing."""
    low, high = (
        torch.tensor(one).mul(cells).div(whole).item() for one in (low, high)
    )
    return (low, high) if low < high and low < cells and high > 0 else None


def literal(gt, size):
    """Union, foreground and valid cells, one after the other."""
    rows, columns = size
    union = torch.zeros(gt.num_images, 1, rows, columns)
    foreground, valid = torch.zeros_like(union), torch.ones_like(union)
    seen = owned(gt, gt.boxes, gt.image)
    hidden = owned(gt, gt.ignored, gt.ignored_image)
    for index in range(gt.num_images):
        height, width = gt.image_shapes[index]
        for row in range(rows):
            for column in range(columns):
                at = index, 0, row, column
                if row * gt.shape[0] >= height * rows:
                    valid[at] = 0
                if column * gt.shape[1] >= width * columns:
                    valid[at] = 0
                for x1, y1, x2, y2 in hidden[index]:
                    if covers(x1, x2, gt.shape[1], columns, column) and covers(
                        y1, y2, gt.shape[0], rows, row
                    ):
                        valid[at] = 0
                for x1, y1, x2, y2 in seen[index]:
                    x = extent(x1, x2, gt.shape[1], columns)
                    y = extent(y1, y2, gt.shape[0], rows)
                    if x is None or y is None:
                        continue
                    if within(x, column, 0) and within(y, row, 0):
                        union[at] = 1
                    if within(x, column, 1) and within(y, row, 1):
                        share = 1 / (length(x) * length(y))
                        foreground[at] = max(foreground[at].item(), share)
    return union, foreground, valid


def covers(low, high, whole, cells, cell):
    found = extent(low, high, whole, cells)
    return found is not None and within(found, cell, 0)


def within(one, cell, more):
    return math.floor(one[0]) <= cell < math.ceil(one[1]) + more


def length(one):
    return math.ceil(one[1]) + 1 - math.floor(one[0])


def compared(case):
    gt = case.ground_truth()
    union, foreground, valid = literal(gt, case.cells)
    torch.testing.assert_close(valid_mask(gt, case.cells), valid)
    torch.testing.assert_close(union_mask(gt, case.cells), union * valid)
    found = foreground_mask(gt, case.cells)
    torch.testing.assert_close(found, foreground * valid)
    behind = ((foreground == 0) * valid).float()
    count = behind.sum((2, 3), keepdim=True).clamp(min=1)
    torch.testing.assert_close(background_mask(gt, case.cells), behind / count)


@quick
@given(case=FEW)
@example(case=odd.Case(boxes=('turned', 'outside'), ignored='sliver'))
@example(case=odd.Case(boxes=('nested',), narrow=True, cells=(1, 1)))
@example(case=odd.Case(boxes=('touching', 'line'), cells=(5, 3)))
def test_masks_are_those_of_a_look_at_each_cell(case):
    compared(case)


@pytest.mark.soak
@thorough
@given(case=FEW)
def test_masks_of_many_batches_are_those_of_a_look_at_each_cell(case):
    compared(case)


@quick
@given(case=odd.cases())
@example(case=MANY)
def test_the_order_of_boxes_does_not_matter(case):
    gt = case.ground_truth()
    order = torch.randperm(
        len(gt.boxes), generator=torch.Generator().manual_seed(case.seed)
    )
    other = dataclasses.replace(
        gt,
        boxes=gt.boxes[order],
        labels=gt.labels[order],
        image=gt.image[order],
    )
    for mask in (union_mask, foreground_mask, background_mask):
        assert torch.equal(mask(gt, case.cells), mask(other, case.cells))


@quick
@given(case=odd.cases(dtype='float32'))
@example(case=MANY)
def test_regions_of_a_flat_map_are_its_value_or_nothing(case):
    """Where a box leaves the map there is less than nothing to read."""
    gt = case.ground_truth()
    flat = torch.full((gt.num_images, 3, *case.cells), 2.0)
    found = region_vectors(flat, gt)
    assert found.shape == (len(gt.boxes), 3)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found <= 2 + 1e-5).all()
