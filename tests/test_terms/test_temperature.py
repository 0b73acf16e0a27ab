import copy
import math
from itertools import pairwise

import pytest
import torch

from mmkd.terms.temperature import Temperature, convergence_share

STEPS = 200


def walk(temperature, loss=lambda progress: 1.0, steps=STEPS):
    """T of every step of a training whose loss is known."""
    found = []
    for step in range(steps):
        progress = step / steps
        if temperature.listens:
            temperature.observe(progress, torch.tensor(loss(progress)))
        found.append(temperature(progress))
    return found


def test_cosine_falls_from_the_one_bound_to_the_other():
    found = walk(Temperature('cosine', tmin=2.0, tmax=6.0))
    assert found[0] == 6.0
    assert found[-1] == 2.0
    assert all(one >= other for one, other in pairwise(found))
    assert len(set(found)) == 10


def test_cosine_is_that_of_the_block():
    temperature = Temperature('cosine', tmin=1.0, tmax=3.0, interval=0.2)
    for block in range(5):
        wanted = 2.0 + math.cos(math.pi * block / 4)
        for inside in (0.0, 0.1, 0.19):
            assert temperature(0.2 * block + inside) == pytest.approx(wanted)


def test_loss_stands_between_the_least_and_the_largest():
    losses = [4.0, 2.0, 3.0, 1.0]
    temperature = Temperature('loss', 2.0, 6.0, interval=0.25)
    found = walk(temperature, lambda x: losses[int(4 * x)], steps=8)
    # Means are known a block later; the start serves until there are two.
    assert found == [4.0] * 4 + [2.0] * 2 + [4.0] * 2


def test_a_steep_loss_is_hot_and_a_resting_one_cold():
    def falling(progress):
        return math.exp(-30 * progress)

    found = walk(Temperature('convergence', 2.0, 6.0, rate=1.0), falling)
    assert found[0] == 4.0
    assert found[45] > 5.5
    assert found[-1] < 2.01


def test_convergence_is_one_minus_the_exponential_of_the_slope():
    temperature = Temperature('convergence', 2.0, 6.0, interval=0.5, rate=0.3)
    temperature.observe(0.0, torch.tensor(8.0))
    temperature.observe(0.5, torch.tensor(6.0))
    temperature.observe(0.0, torch.tensor(0.0))  # ends the block
    slope = (2.0 / 8.0) / 0.5
    wanted = 2.0 + 4.0 * (1 - math.exp(-0.3 * slope))
    assert temperature(0.5) == pytest.approx(wanted)


def test_up_and_down_are_equally_steep():
    assert convergence_share([2.0, 1.0, 1.5], 2.0) == pytest.approx(
        convergence_share([2.0, 1.5, 1.0], 2.0)
    )


@pytest.mark.parametrize('policy', ['cosine', 'loss', 'convergence'])
@pytest.mark.parametrize('seed', [0, 1])
def test_it_stays_within_its_bounds_and_moves(policy, seed):
    torch.manual_seed(seed)
    noise = torch.randn(STEPS).exp().tolist()
    found = walk(
        Temperature(policy, 3.0, 5.0), lambda x: noise[round(x * STEPS)]
    )
    assert all(3.0 <= one <= 5.0 for one in found)
    assert len(set(found)) > 2, 'a constant temperature is none that moves'


def test_it_changes_only_where_a_block_ends():
    noise = torch.rand(STEPS).tolist()
    found = walk(Temperature('loss'), lambda x: noise[round(x * STEPS)])
    changes = [
        step for step in range(1, STEPS) if found[step] != found[step - 1]
    ]
    assert changes
    assert all(step % (STEPS // 10) == 0 for step in changes)


@pytest.mark.parametrize('policy', ['loss', 'convergence'])
def test_a_stopped_training_goes_on_as_it_would_have(policy):
    noise = torch.rand(STEPS).tolist()
    whole = Temperature(policy)
    wanted = walk(whole, lambda x: noise[round(x * STEPS)])
    first, second = Temperature(policy), Temperature(policy)
    for step in range(STEPS):
        if step == 77:  # in the middle of a block
            second.load_state(copy.deepcopy(first.state()))
            first = second
        first.observe(step / STEPS, torch.tensor(noise[step]))
        assert first(step / STEPS) == wanted[step]
    assert first.means == whole.means


def test_a_loss_that_overflows_is_not_heard():
    temperature = Temperature('loss', interval=0.25)
    losses = [4.0, float('inf'), 2.0, 3.0]
    found = walk(temperature, lambda x: losses[int(4 * x)], steps=8)
    assert temperature.means == [4.0, 2.0]
    assert found[-1] == 2.0


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(policy='cosin'), "no policy 'cosin'. Did you mean 'cosine'?"),
        (dict(tmin=5.0, tmax=5.0), 'Set tmin below tmax'),
        (dict(start=7.0), 'Set start to a number between'),
        (dict(interval=0.6), 'Set it to 0.5 or less'),
        (dict(tmin=0.0), 'needs tmin > 0'),
        (dict(interval=0.0), 'needs interval > 0'),
    ],
)
def test_what_could_not_move_is_refused(settings, message):
    with pytest.raises(ValueError) as error:
        Temperature(**settings)
    assert message in str(error.value)
