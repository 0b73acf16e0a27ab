import pytest
import torch
from torch import nn

from mmkd.ops.ascent import ascend, direction, evaluating


@pytest.fixture
def room():
    """Two inputs of three entries; anything up to 10 is allowed."""
    return 10 * torch.ones(2, 3)


def plane(slopes):
    slopes = torch.tensor(slopes)
    return lambda change: (slopes * change).sum(1)


def test_the_raw_gradient_is_plain_ascent(room):
    def objective(change):
        return 3 * change[:, 0] - change[:, 1] ** 2 + change[:, 2]

    found = ascend(objective, -room, room, 2, 0.5, 'raw')
    torch.testing.assert_close(found, torch.tensor([[3.0, 0, 1]] * 2))


def test_each_input_takes_steps_of_its_own_length(room):
    slopes = [[6.0, 8.0, 0.0], [0.0, 0.03, -0.04]]
    found = ascend(plane(slopes), -room, room, 3, 0.5, 'l2')
    torch.testing.assert_close(
        found, torch.tensor([[0.9, 1.2, 0], [0, 0.9, -1.2]])
    )
    found = ascend(plane(slopes), -room, room, 3, 0.5, 'linf')
    torch.testing.assert_close(
        found, torch.tensor([[1.125, 1.5, 0], [0, 1.125, -1.5]])
    )


def test_a_change_stays_in_its_room():
    lower = torch.tensor([[-1.0, -2.0, 0.0]])
    upper = torch.tensor([[0.5, 3.0, 0.0]])
    found = ascend(plane([[2.0, -2.0, 1.0]]), lower, upper, 9, 1.0)
    assert found.tolist() == [[0.5, -2.0, 0.0]]


def test_what_may_not_change_does_not_count_in_the_norm():
    upper = torch.tensor([[5.0, 0.0, 5.0]])
    for norm in ('linf', 'l2'):
        found = ascend(plane([[1.0, 100, 0]]), -upper, upper, 1, 2.0, norm)
        torch.testing.assert_close(found, torch.tensor([[2.0, 0, 0]]))


def test_where_nothing_can_be_gained_nothing_moves(room):
    found = ascend(lambda x: (0 * x).sum(1), -room, room, 2, 1.0)
    assert (found == 0).all()
    found = ascend(lambda x: x.square().sum(1), -room, room, 2, 1.0, 'raw')
    assert (found == 0).all()


def test_it_stops_at_the_ceiling_to_first_order(room):
    slopes = [[4.0, 0.0, 0.0], [0.0, 0.1, 0.0]]
    found = ascend(plane(slopes), -room, room, 3, 0.5, ceiling=1.0)
    # The first reaches it by a quarter of a unit, the second never.
    torch.testing.assert_close(
        found, torch.tensor([[0.25, 0, 0], [0, 1.5, 0]])
    )
    above = ascend(plane(slopes), -room, room, 1, 0.5, ceiling=-1.0)
    assert (above == 0).all()


def test_steps_follow_the_gradient_of_where_they_are(room):
    def hill(change):  # its top is at 1
        return -(change[:, 0] - 1).square()

    found = ascend(hill, -room, room, 2, 0.25, 'raw')
    # 0.25 * 2 * (1 - 0), then 0.25 * 2 * (1 - 0.5).
    torch.testing.assert_close(found[:, 0], torch.tensor([0.75, 0.75]))


def test_no_weight_is_given_a_gradient(room):
    layer = nn.Linear(3, 1)
    layer.weight.grad = torch.ones(1, 3)
    before = layer.weight.clone()
    found = ascend(lambda x: layer(x)[:, 0], -room, room, 2, 1.0)
    assert not found.requires_grad
    assert (found != 0).any()
    assert torch.equal(layer.weight.grad, torch.ones(1, 3))
    assert layer.bias.grad is None
    assert torch.equal(layer.weight, before)


def test_it_works_where_gradients_are_switched_off(room):
    with torch.no_grad():
        assert (ascend(plane([[1.0, 1, 1]]), -room, room, 1, 1.0) == 1).all()


def test_small_gradients_survive_half_precision(room):
    def half(change):
        return (change.half() * 1e-8).float().sum(1)

    assert (ascend(half, -room, room, 1, 1.0) == 1).all()
    found = ascend(half, -room, room, 1, 1.0, 'raw')
    assert 0 < found.max() < 2e-8


def test_a_direction_has_length_one_or_none():
    torch.manual_seed(0)
    gradient = torch.randn(2, 3, 4, 4)
    gradient[1] = 0
    for norm, order in (('l2', 2), ('linf', torch.inf)):
        found = direction(gradient, norm)
        assert found[0].flatten().norm(order).item() == pytest.approx(1)
        assert (found[1] == 0).all()
    assert direction(gradient, 'raw') is gradient


def test_modes_and_statistics_are_as_they_were():
    part = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout()).train()
    part[1].training = False
    with pytest.raises(RuntimeError), evaluating(part):
        assert not any(one.training for one in part.modules())
        part(torch.randn(2, 2, 4, 4))
        raise RuntimeError('in the middle')
    assert [one.training for one in part] == [True, False]
    assert part.training
    assert part[0].num_batches_tracked == 0
