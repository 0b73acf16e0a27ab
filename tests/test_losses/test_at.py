import pytest
import torch

from mmkd.losses.at import ATLoss, at_loss


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 8, 4, 5).unbind()


def test_attention_to_two_different_cells_by_hand():
    student, teacher = torch.zeros(2, 1, 3, 2, 2).unbind()
    student[0, :, 0, 0] = 5.0  # attention (1, 0, 0, 0)
    teacher[0, 0, 1, 0] = 2.0
    teacher[0, 0, 1, 1] = 2.0  # attention (0, 0, 1, 1) / sqrt(2)
    torch.testing.assert_close(at_loss(student, teacher), torch.tensor(2 / 4))


def test_the_exponent_shapes_the_attention_by_hand():
    student, teacher = torch.zeros(2, 1, 1, 1, 2).unbind()
    student[0, 0, 0] = torch.tensor([3.0, -4.0])
    teacher[0, 0, 0] = 1.0
    first, square = at_loss(student, teacher, 1), at_loss(student, teacher, 2)
    # Half of 2 - 2 cos between (3, 4) or (9, 16) and (1, 1).
    cosine = (3 + 4) / (5 * 2**0.5)
    torch.testing.assert_close(first, torch.tensor(1 - cosine))
    cosine = (9 + 16) / ((9**2 + 16**2) ** 0.5 * 2**0.5)
    torch.testing.assert_close(square, torch.tensor(1 - cosine))


def test_equals_a_literal_loop(maps):
    total = 0.0
    for student, teacher in zip(*maps):
        attention = []
        for feature in (student, teacher):
            mean = [
                sum(v**2 for v in feature[:, y, x].tolist()) / 8
                for y in range(4)
                for x in range(5)
            ]
            norm = sum(v**2 for v in mean) ** 0.5
            attention.append([v / norm for v in mean])
        total += sum((s - t) ** 2 for s, t in zip(*attention))
    assert at_loss(*maps).item() == pytest.approx(total / (2 * 4 * 5))


def test_scale_sign_and_order_of_channels_do_not_matter(maps):
    student, teacher = maps
    torch.testing.assert_close(
        at_loss(student, -3 * teacher.flip(1)), at_loss(student, teacher)
    )


def test_images_are_scaled_one_by_one(maps):
    student, teacher = maps
    scale = torch.tensor([1.0, 100.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(
        at_loss(scale * student, teacher), at_loss(student, teacher)
    )


def test_channels_may_differ(maps):
    student, teacher = maps
    doubled = torch.cat([student, student], 1)
    torch.testing.assert_close(
        at_loss(doubled, teacher), at_loss(student, teacher)
    )


@pytest.mark.parametrize('exponent', [1, 2, 3])
def test_gradient_is_that_of_finite_differences(maps, exponent):
    student, teacher = (one[:, :3].double() for one in maps)
    assert torch.autograd.gradcheck(
        lambda s: at_loss(s, teacher, exponent), student.requires_grad_()
    )


@pytest.mark.parametrize('exponent', [1, 2])
def test_an_empty_map_has_a_finite_gradient(maps, exponent):
    student = torch.zeros_like(maps[0]).requires_grad_()
    at_loss(student, maps[1], exponent).backward()
    assert student.grad.isfinite().all()


def test_module_multiplies_by_its_weight(maps):
    torch.testing.assert_close(
        ATLoss(exponent=1)(*maps), 1000 * at_loss(*maps, 1)
    )


def test_sizes_that_differ_name_the_fix(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='Only the size differs'):
        ATLoss()(student[..., :2], teacher)


def test_an_exponent_below_one_is_refused():
    with pytest.raises(ValueError, match='exponent >= 1'):
        ATLoss(exponent=0.5)
