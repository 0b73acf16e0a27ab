import runs
import torch
from mmengine.config import Config

from mmkd.laboratory import pace

data = runs.data


class Steps:
    """A step that takes as long as its settings say."""

    clock = 0.0
    order = ()

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, batch):
        Steps.clock += self.settings.seconds
        Steps.order += (self.settings.name,)


def test_arms_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(pace, '_Steps', Steps)
    monkeypatch.setattr(pace, 'load_batches', lambda settings: [0, 1])
    monkeypatch.setattr(pace.time, 'perf_counter', lambda: Steps.clock)
    arms = {
        name: Config(dict(name=name, seconds=seconds))
        for name, seconds in (('alone', 1.0), ('pkd', 1.5))
    }
    times = pace.step_times(arms, rounds=2)
    assert Steps.order == ('alone', 'alone', 'pkd', 'pkd') * 3
    assert times == dict(alone=[1.0, 1.0], pkd=[1.5, 1.5])
    assert pace.ratios(times) == dict(alone=1.0, pkd=1.5)


def test_a_slow_round_slows_both_and_leaves_the_ratio():
    times = dict(alone=[1.0, 5.0, 1.0], pkd=[2.0, 10.0, 2.0])
    assert pace.ratios(times)['pkd'] == 2.0


def test_real_steps_leave_the_random_state_as_it_was(data, tmp_path):
    settings = runs.config(data, tmp_path, iters=2)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    times = pace.step_times(dict(alone=settings), rounds=1)
    assert len(times['alone']) == 1
    assert times['alone'][0] > 0
    assert torch.equal(torch.rand(1), expected)
