import pytest
import torch

from mmkd.losses.weighted_mse import WeightedMSELoss, weighted_mse_loss
from mmkd.structures import GroundTruth


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)


def slow(student, teacher, weight):
    above = below = 0.0
    images, channels, rows, columns = student.shape
    for n in range(images):
        for y in range(rows):
            for x in range(columns):
                here = weight[n, 0, y, x].item()
                below += here
                for c in range(channels):
                    error = (student - teacher)[n, c, y, x].item() ** 2
                    above += here * error / channels
    return above / below


def test_equals_the_sum_written_out(maps):
    weight = torch.rand(2, 1, 4, 5)
    assert weighted_mse_loss(*maps, weight).item() == pytest.approx(
        slow(*maps, weight), rel=1e-5
    )


def test_equal_weights_give_the_mean(maps):
    expected = torch.nn.functional.mse_loss(*maps)
    torch.testing.assert_close(WeightedMSELoss(2.0)(*maps), 2 * expected)


def test_the_scale_of_the_weights_does_not_matter(maps):
    weight = torch.rand(2, 1, 4, 5)
    first, *others = (
        weighted_mse_loss(*maps, factor * weight) for factor in (1, 7, 1e-3)
    )
    for one in others:
        torch.testing.assert_close(one, first)


def test_a_cell_without_weight_does_not_count(maps):
    student, teacher = maps
    student.requires_grad_()
    weight = torch.rand(2, 1, 4, 5)
    weight[1, 0, 2, 3] = 0
    weighted_mse_loss(student, teacher, weight).backward()
    still = (student.grad == 0).all(1)
    assert still[1, 2, 3]
    assert still.sum() == 1


def test_nothing_counts(maps):
    student = maps[0].requires_grad_()
    value = weighted_mse_loss(student, maps[1], torch.zeros(2, 1, 4, 5))
    value.backward()
    assert value.item() == 0
    assert (student.grad == 0).all()


def test_the_border_is_left_out_without_a_weight(maps):
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=(32, 40),
        image_shapes=[(32, 40), (16, 40)],
    )
    student, teacher = maps
    changed = student.clone()
    changed[1, :, 2:] += 1
    one, other = (
        WeightedMSELoss()(x, teacher, gt) for x in (student, changed)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    changed[1, :, 1] += 1
    assert WeightedMSELoss()(changed, teacher, gt) != one
