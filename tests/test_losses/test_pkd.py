import pytest
import torch

from mmkd.losses.pkd import PKDLoss, pkd_loss


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 8, 4, 4).unbind()


def test_equals_one_minus_the_correlation(maps):
    student, teacher = maps
    r = [
        torch.corrcoef(torch.stack([s.flatten(), t.flatten()]))[0, 1]
        for s, t in zip(student.unbind(1), teacher.unbind(1))
    ]
    torch.testing.assert_close(
        pkd_loss(student, teacher), 1 - torch.stack(r).mean()
    )


def test_opposite_patterns_cost_two(maps):
    student, _ = maps
    torch.testing.assert_close(pkd_loss(-student, student), torch.tensor(2.0))


def test_scale_of_the_teacher_does_not_matter(maps):
    student, teacher = maps
    torch.testing.assert_close(
        pkd_loss(student, 5 * teacher - 2), pkd_loss(student, teacher)
    )


def test_a_flat_channel_is_finite_with_its_gradient(maps):
    student, teacher = maps
    student = torch.zeros_like(student).requires_grad_()
    pkd_loss(student, teacher).backward()
    assert student.grad.isfinite().all()


def test_channel_mismatch_names_the_fix(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='in_channels=4, out_channels=8'):
        PKDLoss()(student[:, :4], teacher)
