import pytest
import torch

from mmkd.losses.clock_memory import CLoCKMemoryLoss
from mmkd.structures import GroundTruth

BOX = torch.tensor([[0.0, 0, 16, 8]])


def test_one_box_by_hand():
    """A box over cells 0 to 2 of row 0 and 1, both ends included."""
    gt = GroundTruth.from_boxes([BOX], shape=(32, 32))
    student, teacher = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    teacher[0, 0, 0, 0] = 3.0
    teacher[0, 1, 3, 3] = 2.0
    found = CLoCKMemoryLoss(0.1, 0.01)(student, teacher, gt)
    assert found['foreground'].item() == pytest.approx(0.1 * 9 / 6)
    assert found['background'].item() == pytest.approx(0.01 * 4 / 10)


def test_a_second_image_halves_the_share_of_each():
    gt = GroundTruth.from_boxes([BOX, BOX], shape=(32, 32))
    teacher = torch.randn(1, 2, 4, 4).expand(2, -1, -1, -1).clone()
    one = GroundTruth.from_boxes([BOX], shape=(32, 32))
    loss, student = CLoCKMemoryLoss(), torch.zeros(2, 2, 4, 4)
    both, alone = (
        loss(student, teacher, gt),
        loss(student[:1], teacher[:1], one),
    )
    for part in both:
        torch.testing.assert_close(both[part], alone[part])
        assert alone[part] > 0


def test_the_border_and_the_order_of_sides_do_not_count():
    gt = GroundTruth.from_boxes([BOX], shape=(32, 32), image_shapes=[(32, 16)])
    student, teacher = torch.randn(2, 1, 2, 4, 4)
    loss = CLoCKMemoryLoss()
    found = loss(student, teacher, gt)
    assert found == loss(teacher, student, gt)
    teacher[..., 2:] = 100
    assert found == loss(student, teacher, gt)


def test_an_image_without_boxes_is_background():
    gt = GroundTruth.from_boxes([BOX[:0]], shape=(32, 32))
    student = torch.zeros(1, 2, 4, 4)
    found = CLoCKMemoryLoss(1.0, 1.0)(student, torch.ones(1, 2, 4, 4), gt)
    assert found['foreground'] == 0
    assert found['background'] == 2


def test_unequal_maps_and_no_boxes_are_refused():
    one = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match='mmkd.ConvAdapt'):
        CLoCKMemoryLoss()(one, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match='gt=None'):
        CLoCKMemoryLoss()(one, one)
