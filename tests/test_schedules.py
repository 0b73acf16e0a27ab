import math

import pytest

from mmkd.schedules import (
    Between,
    Constant,
    CosineDecay,
    LinearDecay,
    LinearWarmup,
    StopAfter,
)


def test_constant_is_constant():
    assert [Constant(0.3)(t) for t in (0, 0.5, 1)] == [0.3] * 3
    assert Constant()(0.7) == 1


@pytest.mark.parametrize(
    ('progress', 'expected'),
    [(0, 1), (0.2, 1), (0.4, 0.75), (0.6, 0.5), (1.0, 0)],
)
def test_linear_decay_falls_between_begin_and_end(progress, expected):
    decay = LinearDecay(begin=0.2, end=1.0)
    assert decay(progress) == pytest.approx(expected)


def test_decay_ends_where_it_is_told():
    decay = LinearDecay(begin=0.0, end=0.5, start=2.0, stop=0.5)
    assert decay(0) == 2
    assert decay(0.25) == pytest.approx(1.25)
    assert decay(0.5) == decay(0.9) == 0.5


@pytest.mark.parametrize(
    ('progress', 'expected'),
    [
        (0, 1),
        (1 / 3, 0.75),  # (1 + cos 60°) / 2
        (0.5, 0.5),
        (2 / 3, 0.25),
        (1, 0),
    ],
)
def test_cosine_decay_follows_half_a_cosine(progress, expected):
    assert CosineDecay()(progress) == pytest.approx(expected)


def test_cosine_is_flat_at_both_ends_and_steepest_in_the_middle():
    decay, step = CosineDecay(), 1e-4
    slope = [(decay(t + step) - decay(t)) / step for t in (0, 0.5, 1 - step)]
    assert slope[0] == pytest.approx(0, abs=1e-3)
    assert slope[1] == pytest.approx(-math.pi / 2, rel=1e-3)
    assert slope[2] == pytest.approx(0, abs=1e-3)


def test_warm_up_rises_and_stays():
    warmup = LinearWarmup(end=0.2, start=0.1)
    assert warmup(0) == pytest.approx(0.1)
    assert warmup(0.1) == pytest.approx(0.55)
    assert warmup(0.2) == warmup(1) == 1


def test_warm_up_from_zero_is_idle_in_the_first_step_alone():
    warmup = LinearWarmup(end=0.5)
    assert warmup(0) == 0
    assert warmup(1 / 1000) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ('fraction', 'expected'),
    [(0, [0, 0, 0]), (0.5, [1, 0, 0]), (1, [1, 1, 0])],
)
def test_stop_after_a_fraction(fraction, expected):
    stop = StopAfter(fraction)
    assert [stop(t) for t in (0, 0.5, 1)] == expected


def test_between_two_points_and_to_the_very_end():
    times = (0, 0.2, 0.5, 0.9, 1)
    assert [Between(0.2, 0.9)(t) for t in times] == [0, 1, 1, 0, 0]
    assert [Between(begin=0.5)(t) for t in times] == [0, 0, 1, 1, 1]
    assert [Between(end=0.5)(t) for t in times] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize('kind', [LinearDecay, CosineDecay, Between])
def test_begin_after_end_is_an_error(kind):
    with pytest.raises(ValueError, match=f'{kind.__name__}.*begin=0.5.*end'):
        kind(begin=0.5, end=0.5)


@pytest.mark.parametrize('settings', [dict(begin=-1), dict(end=12)])
def test_progress_is_no_epoch(settings):
    with pytest.raises(ValueError, match='between 0 and 1'):
        LinearDecay(**settings)
    with pytest.raises(ValueError, match='between 0 and 1'):
        Between(**settings)
    with pytest.raises(ValueError, match='fraction between 0 and 1'):
        StopAfter(12)
