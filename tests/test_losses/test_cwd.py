import math

import pytest
import torch
from torch import nn

from mmkd.losses.cwd import CWDLoss, cwd_loss


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 6, 3, 4).unbind()


def test_two_cells_by_hand():
    # The teacher puts 3/4 of the channel on one cell, the student half.
    teacher = torch.tensor([[[[math.log(3), 0.0]]]])
    student = torch.zeros(1, 1, 1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert cwd_loss(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_equals_a_literal_loop(maps, temperature):
    def shares(values):
        weights = [math.exp(v / temperature) for v in values]
        return [w / sum(weights) for w in weights]

    total = 0.0
    for student, teacher in zip(*(one.flatten(0, 1) for one in maps)):
        total += sum(
            t * math.log(t / s)
            for s, t in zip(
                shares(student.flatten().tolist()),
                shares(teacher.flatten().tolist()),
            )
        )
    expected = temperature**2 * total / (2 * 6)
    assert cwd_loss(*maps, temperature).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_at_high_temperature_it_is_half_the_variance_of_the_gap(maps):
    student, teacher = (one.double() for one in maps)
    gap = (student - teacher).flatten(2)
    torch.testing.assert_close(
        cwd_loss(student, teacher, temperature=1e3),
        gap.var(2, correction=0).mean() / 2,
        rtol=1e-2,
        atol=0,
    )


def test_an_offset_of_a_channel_does_not_matter(maps):
    student, teacher = maps
    offset = torch.arange(12.0).view(2, 6, 1, 1)
    torch.testing.assert_close(
        cwd_loss(student + offset, teacher), cwd_loss(student, teacher)
    )


def test_normalised_neither_scale_nor_shift_of_a_channel_matters(maps):
    student, teacher = maps
    scale = torch.arange(1.0, 7).view(6, 1, 1)
    plain = cwd_loss(student, teacher, normalise=True)
    torch.testing.assert_close(
        cwd_loss(scale * student - 2, teacher, normalise=True), plain
    )
    torch.testing.assert_close(
        cwd_loss(student, scale * teacher - 2, normalise=True), plain
    )
    assert cwd_loss(scale * student, teacher) != cwd_loss(student, teacher)


def test_normalised_by_hand():
    # Standardised, both become (-1, 1) or its reverse.
    student = torch.tensor([[[[10.0, 30.0]]]])
    teacher = torch.tensor([[[[0.2, 0.1]]]])
    share = 1 / (1 + math.exp(-2))
    expected = share * math.log(share / (1 - share))
    expected += (1 - share) * math.log((1 - share) / share)
    assert cwd_loss(student, teacher, normalise=True).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_normalised_equals_batch_normalisation_of_both_sides(maps):
    norm = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    torch.testing.assert_close(
        cwd_loss(*maps, normalise=True),
        cwd_loss(*(norm(5 * one - 3) for one in maps)),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize('normalise', [False, True])
def test_gradient_is_that_of_finite_differences(maps, normalise):
    student, teacher = (one[:, :2].double() for one in maps)
    assert torch.autograd.gradcheck(
        lambda s: cwd_loss(s, teacher, 2.0, normalise),
        student.requires_grad_(),
    )


def test_peaks_that_exclude_each_other_stay_finite():
    student, teacher = torch.zeros(2, 1, 1, 1, 2).unbind()
    student[..., 0], teacher[..., 1] = 1e4, 1e4
    student.requires_grad_()
    loss = cwd_loss(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(1e4))
    assert student.grad.flatten().tolist() == [1, -1]


def test_normalised_a_flat_channel_is_finite_with_its_gradient(maps):
    student, teacher = maps
    student[:, 0], teacher[:, 1] = 3.0, 0.0
    student.requires_grad_()
    cwd_loss(student, teacher, normalise=True).backward()
    assert student.grad.isfinite().all()


def test_class_logits_of_any_number_of_channels_are_compared():
    logits = torch.randn(2, 9 * 80, 3, 4)
    assert cwd_loss(logits, logits).abs() < 1e-6


def test_module_multiplies_by_its_weight(maps):
    loss = CWDLoss(loss_weight=10.0, temperature=2.0, normalise=True)
    torch.testing.assert_close(
        loss(*maps), 10 * cwd_loss(*maps, 2.0, normalise=True)
    )


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match='CWDLoss needs temperature > 0'):
        CWDLoss(temperature=0)
