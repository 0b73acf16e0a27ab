"""Answers of queries that belong together."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Categorical, kl_divergence

from mmkd.losses.query import (
    query_box_errors,
    query_class_divergence,
    weighted_mean,
)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 5)


def test_sigmoid_classes_by_torch(logits):
    student, teacher = logits
    expected = kl_divergence(
        Bernoulli(logits=teacher / 2), Bernoulli(logits=student / 2)
    ).sum(-1)
    found = query_class_divergence(student, teacher, temperature=2.0)
    torch.testing.assert_close(found, 4 * expected)


def test_softmax_classes_by_torch(logits):
    student, teacher = logits
    expected = kl_divergence(
        Categorical(logits=teacher / 2), Categorical(logits=student / 2)
    )
    found = query_class_divergence(student, teacher, True, 2.0)
    torch.testing.assert_close(found, 4 * expected)


@pytest.mark.parametrize('softmax', [False, True])
def test_nothing_is_lost_at_equality(logits, softmax):
    student = logits[0].clone().requires_grad_()
    found = query_class_divergence(student, logits[0], softmax).sum()
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize('softmax', [False, True])
def test_the_gradient_is_the_difference_of_chances(logits, softmax):
    student, teacher = logits
    student = student.clone().requires_grad_()
    query_class_divergence(student, teacher, softmax).sum().backward()
    chance = (lambda x: x.softmax(-1)) if softmax else torch.sigmoid
    torch.testing.assert_close(
        student.grad, (chance(student) - chance(teacher)).detach()
    )


def test_far_logits_stay_finite():
    far = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for softmax in (False, True):
        query_class_divergence(far, -far.detach(), softmax).sum().backward()
    assert far.grad.isfinite().all()


def test_boxes_by_hand():
    student = torch.tensor([0.5, 0.5, 0.4, 0.4])
    teacher = torch.tensor([0.6, 0.5, 0.4, 0.4])
    l1, error = query_box_errors(student, teacher)
    overlap, union, hull = 0.3 * 0.4, 0.5 * 0.4, 0.5 * 0.4
    assert l1.item() == pytest.approx(0.1)
    expected = 1 - (overlap / union - (hull - union) / hull)
    assert error.item() == pytest.approx(expected, rel=1e-5)


def test_equal_boxes_have_no_error():
    box = torch.tensor([0.5, 0.5, 0.4, 0.2])
    l1, error = query_box_errors(box, box)
    assert l1.item() == 0
    assert math.isclose(error.item(), 0, abs_tol=1e-6)


def test_the_mean_is_weighted():
    values, weight = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
    assert weighted_mean(values, weight).item() == pytest.approx(1.5)
    assert weighted_mean(values, torch.zeros(2)).item() == 0
    assert weighted_mean(F.relu(values), torch.ones(1)).item() == 2


def test_boxes_on_either_side_are_as_far():
    teacher = torch.tensor([0.5, 0.5, 0.4, 0.4])
    for step in (-0.1, 0.1):
        l1, _ = query_box_errors(
            teacher + torch.tensor([step, 0, 0, 0]), teacher
        )
        assert l1.item() == pytest.approx(0.1)


def test_boxes_pull_the_student():
    """By the sign of each difference, and towards more overlap."""
    student = torch.tensor([0.6, 0.5, 0.4, 0.2], requires_grad=True)
    teacher = torch.tensor([0.5, 0.5, 0.4, 0.4])
    l1, error = query_box_errors(student, teacher)
    (pull,) = torch.autograd.grad(l1, student)
    assert pull.tolist() == [1, 0, 0, -1]
    (pull,) = torch.autograd.grad(error, student)
    assert pull[0] > 0 > pull[3]
