import runs
import tiny
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
        self.cached = 'new' in settings

    def __call__(self, batches, forget=False):
        key = 'new' if forget else 'seconds'
        Steps.clock += len(batches) * self.settings[key]
        Steps.order += (self.settings.name + '!' * forget,)


def test_arms_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(pace, '_Steps', Steps)
    monkeypatch.setattr(pace, 'load_batches', lambda settings: [0, 1, 2, 3])
    monkeypatch.setattr(pace.time, 'perf_counter', lambda: Steps.clock)
    arms = dict(
        alone=Config(dict(name='alone', seconds=1.0)),
        pkd=Config(dict(name='pkd', seconds=1.5, new=3.5)),
    )
    times = pace.step_times(arms, rounds=2)
    assert Steps.order == ('alone', 'pkd', 'pkd!') * 3
    assert times == {
        'alone': [1.0, 1.0],
        'pkd': [1.5, 1.5],
        'pkd, new images': [3.5, 3.5],
    }
    assert pace.ratios(times) == dict(alone=1.0, pkd=1.5)
    assert pace.ratios(times, new=dict(pkd=0.25)) == dict(alone=1.0, pkd=2.0)


def test_each_arm_steps_through_its_own_data(monkeypatch):
    loaded = []
    monkeypatch.setattr(pace, '_Steps', Steps)
    monkeypatch.setattr(
        pace,
        'load_batches',
        lambda settings: loaded.append(settings.train_dataloader) or [0],
    )
    one, other = (
        dict(name='x', seconds=1.0, train_dataloader=dict(batch_size=size))
        for size in (2, 4)
    )
    arms = dict(a=Config(one), b=Config(other), c=Config(one))
    pace.step_times(arms, rounds=1)
    assert [x.batch_size for x in loaded] == [2, 4]


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


def test_new_images_are_counted(data, tmp_path):
    """One view of each of four images, then two."""
    settings = runs.config(data, tmp_path, iters=2)
    loader = settings.train_dataloader
    loader.dataset.indices = list(range(4))
    load, boxes, *_, pack = loader.dataset.pipeline
    loader.dataset.pipeline = [load, boxes, pack]
    assert pace.new_images(settings, 2) == 1
    assert pace.new_images(settings, 10) == 4 / 20
    assert pace.new_images(settings, 100, most=8) == 4 / 8
    flip = dict(type='RandomFlip', prob=1.0)
    loader.dataset.pipeline = [load, boxes, flip, pack]
    assert pace.new_images(settings, 10) == 4 / 20
    flip['prob'] = 0.5
    loader.dataset.pipeline = [load, boxes, flip, pack]
    assert 4 / 40 < pace.new_images(settings, 20) <= 8 / 40


def test_padding_by_a_neighbour_makes_a_new_image(data, tmp_path):
    settings = runs.config(data, tmp_path, iters=2)
    loader = settings.train_dataloader
    loader.dataset.indices = [0]
    load, boxes, *_, pack = loader.dataset.pipeline
    sizes = dict(
        type='RandomChoiceResize', scales=[(64, 64), (96, 96)], keep_ratio=True
    )
    loader.dataset.pipeline = [load, boxes, sizes, pack]
    # Small in a small batch, small in a large one, and large.
    assert pace.new_images(settings, 20) == 3 / 40


def test_steps_with_a_cache_are_timed_with_and_without(
    data, tmp_path, teachers, terms, monkeypatch
):
    made = []

    class Watched(pace._Steps):
        def __init__(self, settings):
            super().__init__(settings)
            made.append(self)

    monkeypatch.setattr(pace, '_Steps', Watched)
    model = tiny.distilled(tiny.retinanet(), teachers, terms)
    settings = runs.config(data, tmp_path, iters=2, model=model)
    times = pace.step_times(dict(alone=settings), rounds=1)
    assert list(times) == ['alone']
    settings.model.teachers.big.cache = 0.1
    times = pace.step_times(dict(alone=settings), rounds=2)
    assert [*map(len, times.values())] == [2, 2]
    known, new = (one.teachers['big'].memory for one in made[1:])
    images = 2 * pace.BATCHES
    assert known.misses <= images
    assert known.hits >= 2 * images
    assert new.misses == 3 * images
