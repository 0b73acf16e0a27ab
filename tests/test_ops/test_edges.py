import math

import pytest
import torch

from mmkd.ops.edges import bin_places, on_bins, tempered_divergence

ORIGINS = torch.tensor([[40.0, 48.0], [16.0, 24.0]])
STEPS = torch.tensor([[8.0, 8.0], [4.0, 6.0]])


@pytest.fixture
def probs():
    torch.manual_seed(0)
    return torch.randn(2, 4, 5).mul(2).softmax(2)


def test_left_and_top_fall_and_right_and_bottom_grow():
    places = bin_places(ORIGINS, STEPS, 3)
    assert places[1].tolist() == [
        [16, 12, 8],
        [24, 18, 12],
        [16, 20, 24],
        [24, 30, 36],
    ]


def test_on_bins_of_the_same_places_it_stays(probs):
    steps = torch.tensor([8.0, 4.0])
    places = bin_places(ORIGINS, steps[:, None].expand(-1, 2), 5)
    found = on_bins(probs, places, ORIGINS, steps, 5)
    assert torch.equal(found, probs)


def test_more_bins_of_the_same_places_get_nothing(probs):
    steps = torch.tensor([8.0, 4.0])
    places = bin_places(ORIGINS, steps[:, None].expand(-1, 2), 5)
    found = on_bins(probs, places, ORIGINS, steps, 9)
    assert torch.equal(found[..., :5], probs)
    assert found[..., 5:].eq(0).all()


def test_the_mean_stays_on_any_bins(probs):
    places = bin_places(ORIGINS, STEPS, 5)
    origins = ORIGINS + torch.tensor([3.0, 5.0])
    steps = torch.tensor([7.0, 5.5])
    found = on_bins(probs, places, origins, steps, 9)
    torch.testing.assert_close(found.sum(2), torch.ones(2, 4))
    apart = places - origins.repeat(1, 2)[..., None]
    apart[:, :2] *= -1
    inside = (apart >= 0).all(2)  # of left and top bin 0 is beyond
    assert inside.any()
    assert not inside.all()
    mean = (found * torch.arange(9)).sum(2) * steps[:, None]
    wanted = (probs * apart.clamp(min=0)).sum(2)
    torch.testing.assert_close(mean, wanted)


def test_what_lies_beyond_goes_to_the_last_bins():
    probs = torch.tensor([[0.25, 0.75]]).expand(1, 4, 2)
    places = torch.tensor([[[9.0, -99], [9.0, -99], [-9.0, 99], [-9.0, 99]]])
    found = on_bins(probs, places, torch.zeros(1, 2), torch.tensor([2.0]), 4)
    assert found.tolist() == [[[0.25, 0, 0, 0.75]] * 4]


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_divergence_is_the_sum_by_hand(temperature):
    student = torch.tensor([0.5, -1.0, 2.0])
    teacher = torch.tensor([0.7, 0.0, 0.3])
    p = [one ** (1 / temperature) if one else 0.0 for one in teacher.tolist()]
    p = [one / sum(p) for one in p]
    q = [math.exp(one / temperature) for one in student.tolist()]
    q = [one / sum(q) for one in q]
    wanted = sum(a * math.log(a / b) for a, b in zip(p, q) if a)
    found = tempered_divergence(student, teacher, temperature)
    assert found.item() == pytest.approx(temperature**2 * wanted / 3, rel=1e-5)


def test_logits_of_the_same_distribution_cost_nothing_and_push_nowhere():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5, requires_grad=True)
    found = tempered_divergence(logits, logits.detach().softmax(-1), 3.0)
    assert found.abs().max() < 1e-6
    found.sum().backward()
    assert logits.grad.abs().max() < 1e-6
