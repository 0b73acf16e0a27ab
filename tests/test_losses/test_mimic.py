import pytest
import torch

from mmkd.losses.mimic import MimicLoss, mimic_loss


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return torch.randn(2, 2, 8, 4, 5).unbind()


def test_a_constant_gap_costs_its_square():
    teacher = torch.zeros(2, 3, 4, 5)
    gap = torch.full_like(teacher, 1.5)
    assert mimic_loss(gap, teacher) == 1.5**2
    assert mimic_loss(gap, teacher, 'sum') == 1.5**2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ('distance', 'mean'),
    [
        ('squared', (0.25 + 9 + 0 + 1) / 4),
        ('absolute', (0.5 + 3 + 0 + 1) / 4),
        ('smooth', (0.125 + 2.5 + 0 + 0.5) / 4),
    ],
)
def test_distances_by_hand(distance, mean):
    teacher = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2)
    gap = torch.tensor([0.5, -3, 0, 1]).view(1, 1, 2, 2)
    loss = MimicLoss(2.0, distance=distance)
    assert loss(teacher + gap, teacher).item() == pytest.approx(2 * mean)
    total = mimic_loss(teacher + gap, teacher, 'sum', distance=distance)
    assert total.item() == pytest.approx(4 * mean)


def test_sum_is_the_mean_times_the_elements_of_one_image(maps):
    torch.testing.assert_close(
        mimic_loss(*maps, 'sum'), mimic_loss(*maps) * 8 * 4 * 5
    )


def test_equals_a_literal_loop(maps):
    student, teacher = maps
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist())
    total = sum((s - t) ** 2 for s, t in pairs)
    assert mimic_loss(*maps, 'sum').item() == pytest.approx(total / 2)


def test_normalised_it_is_two_minus_two_cosines(maps):
    student, teacher = maps
    cosine = torch.cosine_similarity(student, teacher, dim=1)
    torch.testing.assert_close(
        mimic_loss(student, teacher, 'sum', normalise=True),
        (2 - 2 * cosine).sum() / 2,
    )
    torch.testing.assert_close(
        mimic_loss(3 * student, teacher, normalise=True),
        mimic_loss(student, teacher, normalise=True),
    )


def test_normalised_an_empty_location_has_a_small_gradient(maps):
    student, teacher = maps
    student[:, :, 0, 0] = 0
    student.requires_grad_()
    mimic_loss(student, teacher, 'sum', normalise=True).backward()
    assert student.grad.abs().max() < 10


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('normalise', [False, True])
def test_gradient_is_that_of_finite_differences(maps, reduction, normalise):
    student, teacher = (one[:, :3].double() for one in maps)
    assert torch.autograd.gradcheck(
        lambda s: mimic_loss(s, teacher, reduction, normalise),
        student.requires_grad_(),
    )


def test_module_multiplies_by_its_weight(maps):
    loss = MimicLoss(loss_weight=2.5, reduction='sum', normalise=True)
    torch.testing.assert_close(
        loss(*maps), 2.5 * mimic_loss(*maps, 'sum', normalise=True)
    )


def test_a_misspelt_reduction_fails_at_build():
    with pytest.raises(ValueError, match="Did you mean 'mean'"):
        MimicLoss(reduction='meen')
    with pytest.raises(ValueError, match="Did you mean 'smooth'"):
        MimicLoss(distance='smoth')


def test_channel_mismatch_names_the_fix(maps):
    student, teacher = maps
    with pytest.raises(ValueError, match='in_channels=4, out_channels=8'):
        MimicLoss()(student[:, :4], teacher)
