"""IoU and GIoU of boxes: by hand, and against mmdet's and torchvision's."""

import pytest
import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
from torchvision.ops import box_iou, generalized_box_iou_loss

from mmkd.ops.boxes import corners, giou, giou_error, iou

#: IoU 1/3; nothing common, and 2 of the hull's 6 empty; nothing at all.
ONE = torch.tensor([0.0, 0, 2, 1])
HALF = torch.tensor([1.0, 0, 3, 1])
FAR = torch.tensor([4.0, 0, 6, 1])
TURNED = torch.tensor([1.0, 0, 0, 1])


@pytest.fixture
def boxes():
    torch.manual_seed(0)
    return torch.rand(2, 2, 5, 4) * 0.5 + 0.2


def upright(*shape):
    """Corners of boxes of which some overlap and some do not."""
    corner = 20 * torch.rand(*shape, 2)
    return torch.cat([corner, corner + 1 + 15 * torch.rand(*shape, 2)], -1)


def test_corners_are_those_of_mmdet(boxes):
    torch.testing.assert_close(corners(boxes), bbox_cxcywh_to_xyxy(boxes))


@pytest.mark.parametrize(('ours', 'mode'), [(iou, 'iou'), (giou, 'giou')])
def test_all_pairs_are_as_mmdet_says(boxes, ours, mode):
    first, second = corners(boxes[0]), corners(boxes[1])
    expected = bbox_overlaps(first, second, mode=mode)
    found = ours(first[:, :, None], second[:, None])
    torch.testing.assert_close(found, expected)


def test_iou_is_that_of_torchvision():
    torch.manual_seed(0)
    one, other = upright(40), upright(30)
    expected = box_iou(one, other)
    assert 0 in expected
    torch.testing.assert_close(iou(one[:, None], other), expected)


@pytest.mark.parametrize(
    ('other', 'ratio', 'rest'),
    [(ONE, 1, 0), (HALF, 1 / 3, 0), (FAR, 0, 1 / 3)],
)
def test_boxes_by_hand(other, ratio, rest):
    for pair in ((ONE, other), (other, ONE)):
        assert iou(*pair).item() == pytest.approx(ratio)
        assert giou(*pair).item() == pytest.approx(ratio - rest)
        assert giou_error(*pair).item() == pytest.approx(1 - ratio + rest)


def test_a_box_inside_out_has_no_area():
    """As that without width at its left edge: IoU 0, hull as large."""
    for pair in ((TURNED, ONE), (ONE, TURNED)):
        assert iou(*pair).item() == 0
        assert giou(*pair).item() == pytest.approx(0)
    # Its first corner counts for the hull, of which 3 of 5 are empty.
    right = torch.tensor([5.0, 0, 4, 1])
    for pair in ((right, ONE), (ONE, right)):
        assert giou(*pair).item() == pytest.approx(-3 / 5)


def test_giou_takes_corners_from_any_axis():
    torch.manual_seed(0)
    one, other = upright(2, 3, 5), upright(2, 3, 5)
    torch.testing.assert_close(
        giou_error(one.movedim(3, 0), other.movedim(3, 0), axis=0),
        generalized_box_iou_loss(one, other),
    )


def test_gradients_are_those_of_torchvision():
    torch.manual_seed(0)
    one, other = (upright(50).requires_grad_() for _ in range(2))
    weight = torch.rand(50)
    expected, found = (
        torch.autograd.grad((weight * error(one, other)).sum(), (one, other))
        for error in (generalized_box_iou_loss, giou_error)
    )
    torch.testing.assert_close(found, expected)


def test_boxes_without_extent_have_nothing_in_common():
    point = torch.zeros(4, requires_grad=True)
    for ours in (iou, giou):
        value = ours(point, torch.zeros(4))
        assert value.item() == 0
        (grad,) = torch.autograd.grad(value, point)
        assert grad.isfinite().all()
