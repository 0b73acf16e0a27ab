import random

import numpy as np
import pytest
import torch

from mmkd.randomness import preserved, stream_seed


def seed_all(seed=0):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.mark.parametrize('seed', [None, 7])
def test_every_global_stream_goes_on_as_if_nothing_was_drawn(seed):
    seed_all()
    expected = draw()
    seed_all()
    with preserved(seed):
        draw()
    assert draw() == expected


def test_an_error_inside_puts_the_streams_back_as_well():
    seed_all()
    expected = draw()
    seed_all()
    with pytest.raises(KeyError), preserved(3):
        draw()
        raise KeyError
    assert draw() == expected


def test_a_seed_fixes_what_is_drawn_inside():
    drawn = []
    for before in (1, 2):
        torch.manual_seed(before)
        with preserved(9):
            drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_without_a_seed_the_present_stream_goes_on():
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    with preserved():
        assert torch.equal(torch.rand(1), expected)


def test_seeds_differ_by_run_iteration_and_rank():
    seeds = {
        stream_seed(run, iteration, rank)
        for run in (0, 1, 2**40)
        for iteration in range(20)
        for rank in range(4)
    }
    assert len(seeds) == 3 * 20 * 4


def test_a_seed_is_the_same_every_time_and_fits_torch():
    assert stream_seed(3, 5, 1) == stream_seed(3, 5, 1)
    # torch.initial_seed() may be any 64-bit number, also a negative one
    for run in (0, -1, 2**63 - 1, 2**64 - 1):
        seed = stream_seed(run, 10**7, 63)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


def test_streams_of_neighbouring_iterations_are_unrelated():
    drawn = []
    generator = torch.Generator()
    for iteration in range(200):
        generator.manual_seed(stream_seed(0, iteration, 0))
        drawn.append(torch.rand(2, generator=generator))
    first, second = torch.stack(drawn).unbind(1)
    pairs = torch.stack([first[:-1], first[1:]])
    # 200 independent pairs: |r| exceeds 0.25 once in 3000 times
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.25
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.25
