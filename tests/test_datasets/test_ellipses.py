"""Masks of boxes: ellipses that touch their sides."""

import math

import torch
from mmdet.structures.bbox import HorizontalBoxes

from mmkd.datasets.ellipses import EllipseMasks


def masks(boxes, height=90, width=120):
    boxes = HorizontalBoxes(torch.tensor(boxes).reshape(-1, 4))
    results = dict(gt_bboxes=boxes, img_shape=(height, width))
    return EllipseMasks()(results)['gt_masks'].masks


def test_an_ellipse_fills_its_box_by_a_quarter_of_pi():
    (mask,) = masks([10.0, 20.0, 110.0, 80.0])
    assert mask.shape == (90, 120)
    assert abs(mask.sum() / 6000 - math.pi / 4) < 0.005
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    assert (rows.min(), rows.max()) == (20, 79)
    assert (columns.min(), columns.max()) == (10, 109)


def test_each_object_has_its_own_and_borders_cut_it():
    one, other = masks([[0.0, 0.0, 20.0, 20.0], [-10.0, 40.0, 10.0, 60.0]])
    assert one[10, 10] == other[50, 0] == 1
    assert one[50, 0] == other[10, 10] == 0
    assert abs(other.sum() / 200 - math.pi / 4) < 0.05


def test_edges_between_pixels_count_as_they_are():
    assert masks([0.6, 0.0, 2.4, 1.0], 1, 4).tolist() == [[[0, 1, 0, 0]]]


def test_no_objects_have_no_masks():
    assert masks([]).shape == (0, 90, 120)
