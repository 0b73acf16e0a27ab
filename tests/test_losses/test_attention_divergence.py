"""Rows of attention maps: by hand, literally, and what has no part in it."""

import math

import pytest
import torch

from mmkd.losses.attention_divergence import attention_divergence


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.rand(2, 2, 3, 4, 5).softmax(-1).unbind()


def test_equals_the_literal_formula(maps):
    student, teacher = maps
    rows = torch.rand(2, 3, 4) > 0.4
    columns = torch.rand(2, 3, 5) > 0.4
    expected = 0.0
    for layer in range(2):
        found = []
        for image in range(3):
            some = columns[layer, image]
            for row in range(4):
                if not rows[layer, image, row]:
                    continue
                own, other = (
                    one[layer, image, row][some] for one in (student, teacher)
                )
                own, other = own / own.sum(), other / other.sum()
                found.append((other * (other / own).log()).sum())
        expected += torch.stack(found).mean()
    torch.testing.assert_close(
        attention_divergence(student, teacher, rows, columns),
        expected,
        atol=1e-5,
        rtol=1e-4,
    )


def test_equal_maps_are_at_0(maps):
    assert attention_divergence(maps[0], maps[0]).item() == 0


def test_it_is_the_teacher_whose_rows_are_expected():
    student, teacher = (
        torch.tensor([row]).view(1, 1, 1, 2)
        for row in ([0.5, 0.5], [0.9, 0.1])
    )
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    found = attention_divergence(student, teacher).item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_layers_are_added_and_rows_averaged(maps):
    student, teacher = maps
    each = [
        attention_divergence(one[None], other[None])
        for one, other in zip(student, teacher)
    ]
    torch.testing.assert_close(
        attention_divergence(student, teacher), sum(each)
    )
    twice = [torch.cat([one, one], 2) for one in maps]
    torch.testing.assert_close(attention_divergence(*twice), sum(each))


def test_what_does_not_count_may_be_anything(maps):
    student, teacher = maps
    columns = torch.ones(2, 3, 5, dtype=torch.bool)
    columns[..., 1] = False
    before = attention_divergence(student, teacher, columns=columns)
    student = student.clone()
    student[..., 1] *= 9
    found = attention_divergence(student, teacher, columns=columns)
    torch.testing.assert_close(found, before)


def test_nothing_that_counts_is_0_with_a_gradient(maps):
    student = maps[0].requires_grad_()
    none = torch.zeros(2, 3, 4, dtype=torch.bool)
    columns = torch.zeros(2, 3, 5, dtype=torch.bool)
    loss = attention_divergence(student, maps[1], none, columns)
    assert loss.item() == 0
    loss.backward()
    assert student.grad.isfinite().all()


def test_where_the_student_does_not_look_at_all_it_is_defined():
    student = torch.tensor([[[[1.0, 0.0]]]], requires_grad=True)
    loss = attention_divergence(student, torch.tensor([[[[0.0, 1.0]]]]))
    loss.backward()
    assert 5 < loss.item() < 20
    assert student.grad.isfinite().all()


def test_half_precision_is_computed_in_float(maps):
    found = attention_divergence(*(one.half() for one in maps))
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, attention_divergence(*maps), atol=1e-3, rtol=1e-2
    )


def test_without_rows_it_is_the_mean_of_all():
    torch.manual_seed(0)
    student, teacher = torch.rand(2, 3, 2, 4, 5).softmax(-1)
    rows = torch.ones(3, 2, 4)
    torch.testing.assert_close(
        attention_divergence(student, teacher),
        attention_divergence(student, teacher, rows),
    )
