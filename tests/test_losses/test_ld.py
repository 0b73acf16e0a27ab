import math

import pytest
import torch

from mmkd.losses.ld import LDLoss, edge_divergence
from mmkd.structures import GroundTruth

BINS = 5


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    return tuple(
        tuple(torch.randn(2, 4 * BINS, size, size + 1) for size in (4, 2))
        for _ in range(2)
    )


def probabilities(logits, temperature):
    powers = [math.exp(one / temperature) for one in logits]
    return [one / sum(powers) for one in powers]


def slow(student, teacher, temperature):
    """Divergence of one anchor's 4·B logits."""
    total = 0.0
    for edge in range(4):
        part = slice(edge * BINS, (edge + 1) * BINS)
        own = probabilities(student[part].tolist(), temperature)
        other = probabilities(teacher[part].tolist(), temperature)
        for p, q in zip(other, own):
            total += p * math.log(p / q) / BINS
    return temperature**2 * total / 4


@pytest.mark.parametrize('temperature', [1.0, 10.0])
def test_divergence_equals_the_sum_written_out(pyramid, temperature):
    student, teacher = (one[0] for one in pyramid)
    found = edge_divergence(student, teacher, temperature)
    assert found.shape == (2, 1, 4, 5)
    for n, y, x in torch.cartesian_prod(*map(torch.arange, (2, 4, 5))):
        expected = slow(student[n, :, y, x], teacher[n, :, y, x], temperature)
        assert found[n, 0, y, x].item() == pytest.approx(
            expected, rel=1e-4, abs=1e-6
        )


def test_weights_reach_across_levels(pyramid):
    """One cell of each level counts, twice and once."""
    weight = [torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 2, 3)]
    weight[0][1, 0, 3, 2], weight[1][0, 0, 1, 1] = 2.0, 1.0
    first, second = (
        edge_divergence(one, other)[place]
        for one, other, place in zip(*pyramid, ((1, 0, 3, 2), (0, 0, 1, 1)))
    )
    total = 2 * first + second
    for average, divisor in ((True, 3), (False, 1)):
        value = LDLoss(average=average, loss_weight=0.25)(
            *pyramid, None, weight
        )
        torch.testing.assert_close(value, 0.25 * total / divisor)


def test_few_positives_are_not_blown_up(pyramid):
    """Weights that sum to less than one do not divide."""
    weight = [torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 2, 3)]
    weight[0][0, 0, 0, 0] = 0.1
    one, other = (
        LDLoss(average=x)(*pyramid, None, weight) for x in (True, False)
    )
    torch.testing.assert_close(one, other)


def test_gradient_is_the_difference_of_the_distributions(pyramid):
    """T · (p_S − p_T) / (4 B), the softmax's well-known one."""
    student, teacher = (one[0].double() for one in pyramid)
    student.requires_grad_()
    edge_divergence(student, teacher, 10.0).sum().backward()
    own, other = (
        (one.detach().reshape(2, 4, BINS, 4, 5) / 10).softmax(2)
        for one in (student, teacher)
    )
    expected = 10 * (own - other) / (4 * BINS)
    torch.testing.assert_close(student.grad, expected.reshape(student.shape))


def test_a_constant_added_to_an_edge_changes_nothing(pyramid):
    student, teacher = (one[0] for one in pyramid)
    moved = student.clone()
    moved[:, BINS : 2 * BINS] += 3
    torch.testing.assert_close(
        edge_divergence(moved, teacher),
        edge_divergence(student, teacher),
        rtol=1e-3,
        atol=1e-5,
    )


def test_anchors_of_a_cell_stand_one_after_the_other(pyramid):
    student, teacher = (
        torch.cat([one[0], one[0].flip(-1)], 1) for one in pyramid
    )
    both = edge_divergence(student, teacher, anchors=2)
    alone = edge_divergence(pyramid[0][0], pyramid[1][0])
    torch.testing.assert_close(both, torch.cat([alone, alone.flip(-1)], 1))


def test_without_weights_the_border_is_left_out(pyramid):
    gt = GroundTruth.from_boxes(
        [torch.zeros(0, 4)] * 2,
        shape=(32, 40),
        image_shapes=[(32, 40), (16, 40)],
    )
    student, teacher = pyramid
    changed = [one.clone() for one in student]
    changed[0][1, :BINS, 2:] += torch.randn(BINS, 1, 1)
    one, other = (LDLoss()(x, teacher, gt) for x in (student, changed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    changed[0][0, :BINS, 2:] += torch.randn(BINS, 1, 1)
    assert LDLoss()(changed, teacher, gt) != one


def test_other_channels_are_refused():
    x = torch.zeros(1, 6, 2, 2)
    with pytest.raises(ValueError, match=r'multiple of 4; got 6.*output=1'):
        edge_divergence(x, x)
    x = torch.zeros(1, 12, 2, 2)
    with pytest.raises(ValueError, match=r'multiple of 8; got 12'):
        edge_divergence(x, x, anchors=2)
