import json
import math

import numpy as np
import pytest

from mmkd.analysis.statistics import (
    Interval,
    gap_closed,
    holm,
    paired_interval,
    paired_p,
    percentile_interval,
    required_seeds,
    separated,
    sign_test,
)

#: AP of a student alone and with feature distillation, seeds 1 to 6.
PLAIN = np.array([18.2, 19.4, 16.7, 15.4, 17.0, 15.8])
FEATURE = np.array([34.6, 36.1, 32.1, 32.4, 35.1, 33.0])


def test_six_seeds_give_the_interval_of_the_textbook():
    # Differences 16.4 16.7 15.4 17.0 18.1 17.2 lie −0.4 −0.1 −1.4 0.2 1.3 0.4
    # from 16.8, whose squares add up to 4.02; t of 5 degrees is 2.571 in every
    # table, and 2.571 · √(0.804 / 6) = 0.94.
    one = paired_interval(FEATURE - PLAIN)
    assert (one.mean, one.n) == (pytest.approx(16.8), 6)
    assert one.sd == pytest.approx(math.sqrt(4.02 / 5))
    assert (one.low, one.high) == pytest.approx((15.86, 17.74), abs=0.005)


def test_two_seeds_have_the_interval_of_cauchy():
    # With one degree of freedom t is tan(0.95 π / 2), and s = √2 for 1 and 3.
    one = paired_interval([1, 3])
    assert one.sd == pytest.approx(math.sqrt(2))
    half = math.tan(0.95 * math.pi / 2)
    assert (one.low, one.high) == pytest.approx((2 - half, 2 + half))


def test_the_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, (3000, 6))
    for level in (0.8, 0.95):
        made = [paired_interval(one, level) for one in draws]
        covered = np.mean([one.low <= 3 <= one.high for one in made])
        error = math.sqrt(level * (1 - level) / len(draws))
        assert covered == pytest.approx(level, abs=3 * error)


def test_one_seed_has_a_mean_and_no_interval():
    one = paired_interval([2.5])
    assert (one.mean, one.n) == (2.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(paired_p([2.5]))


@pytest.mark.parametrize('values', [[], [1, math.nan], 3.0, [[1, 2]]])
def test_what_is_not_one_number_a_seed_is_an_error(values):
    for function in (paired_interval, paired_p, sign_test):
        with pytest.raises(ValueError, match='one finite number per seed'):
            function(values)


def test_a_level_of_certainty_is_an_error():
    with pytest.raises(ValueError, match='level=1'):
        paired_interval([1, 2], level=1)


def test_an_interval_is_valid_json():
    one = Interval(1.5, math.nan, math.inf, 0.5, 3, 'why')
    text = json.dumps(one.as_dict(), allow_nan=False)
    assert json.loads(text) == dict(
        mean=1.5, low=None, high=None, sd=0.5, n=3, note='why'
    )


def test_p_of_two_seeds_is_the_tail_of_cauchy():
    # t = 2 / (√2 / √2) = 2, and Cauchy's tails are 1 − 2 atan(t) / π.
    assert paired_p([1, 3]) == pytest.approx(1 - 2 * math.atan(2) / math.pi)


@pytest.mark.parametrize('level', [0.5, 0.9, 0.95, 0.99])
def test_p_agrees_with_the_interval_that_touches_zero(level):
    shifted = FEATURE - PLAIN
    shifted = shifted - paired_interval(shifted, level).low
    assert paired_p(shifted) == pytest.approx(1 - level)
    assert paired_p(-shifted) == pytest.approx(1 - level)


def test_differences_without_spread_are_certain():
    assert paired_p([2, 2, 2]) == 0
    assert paired_p([0, 0, 0]) == 1


@pytest.mark.parametrize(
    ('wins', 'losses', 'p'),
    [(6, 0, 2 / 64), (0, 8, 2 / 256), (5, 1, 14 / 64), (3, 3, 1)],
)
def test_sign_test_counts_coins(wins, losses, p):
    # 5 to 1: (1 + 6) of 64 throws on either side
    one = sign_test([0.5] * wins + [-2] * losses + [0, 0])
    assert (one.wins, one.losses, one.ties) == (wins, losses, 2)
    assert one.p == pytest.approx(p)


def test_nothing_but_ties_shows_nothing():
    assert sign_test([0, 0]).p == 1


def test_holm_by_hand():
    # In order: 4 × 0.005, 3 × 0.01, 2 × 0.03, and 0.04 may not fall below.
    adjusted = holm(dict(a=0.01, b=0.04, c=0.03, d=0.005))
    assert list(adjusted) == ['a', 'b', 'c', 'd']
    assert adjusted == pytest.approx(dict(a=0.03, b=0.06, c=0.06, d=0.02))


def test_holm_never_exceeds_one_and_leaves_out_what_was_not_tested():
    adjusted = holm(dict(a=0.7, b=math.nan, c=0.9))
    assert math.isnan(adjusted.pop('b'))
    assert adjusted == dict(a=1, c=1)
    assert holm(dict(a=0.02, b=math.nan))['a'] == 0.02
    assert holm({}) == {}


def test_half_the_gap_is_half():
    # 20 → 30 on average below a teacher of 40
    one = gap_closed([29, 31], [19, 21], 40)
    assert one.mean == pytest.approx(0.5)
    assert one.n == 2


def test_the_gap_interval_holds_the_shares_that_a_t_test_keeps():
    teacher = 60.0
    one = gap_closed(FEATURE, PLAIN, teacher, level=0.9)
    gain, gap = FEATURE - PLAIN, teacher - PLAIN
    for end in (one.low, one.high):
        assert paired_p(gain - end * gap) == pytest.approx(0.1)
    assert one.low < one.mean < one.high
    assert one.mean == pytest.approx(gain.mean() / gap.mean())


def test_the_gap_interval_without_spread_in_the_gap_is_that_of_the_gain():
    gain = np.array([1.0, 3.0, 2.0])
    share = gap_closed(10 + gain, [10, 10, 10], 20)
    plain = paired_interval(gain / 10)
    assert (share.low, share.mean, share.high, share.sd) == pytest.approx(
        (plain.low, plain.mean, plain.high, plain.sd)
    )


def test_the_gap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    alone = rng.normal(20, 4, (2000, 5))
    distilled = 10 + 0.5 * alone + rng.normal(4, 2, (2000, 5))
    # true means 20 and 24 under a teacher of 40: a fifth of the gap
    made = [gap_closed(d, a, 40) for d, a in zip(distilled, alone)]
    covered = np.mean([one.low <= 0.2 <= one.high for one in made])
    error = math.sqrt(0.95 * 0.05 / 2000)
    assert covered == pytest.approx(0.95, abs=3 * error)


def test_a_gap_that_may_be_zero_leaves_the_share_unbounded():
    one = gap_closed([22, 30, 24], [18, 30, 22], 24)
    assert (one.low, one.high) == (-math.inf, math.inf)
    assert 'unbounded' in one.note
    assert one.mean == pytest.approx(6 / 2)


def test_a_teacher_below_the_student_leaves_no_gap():
    one = gap_closed([22, 30], [18, 30], 24)
    assert math.isnan(one.mean)
    assert 'the teacher (24) is not above the student alone (24)' in one.note


def test_one_seed_closes_a_share_without_interval():
    one = gap_closed([25], [20], 40)
    assert one.mean == 0.25
    assert math.isnan(one.low)


def test_unpaired_arms_are_an_error():
    with pytest.raises(ValueError, match='distilled: 2, alone: 1'):
        gap_closed([1, 2], [1], 3)
    with pytest.raises(ValueError, match='a: 2, b: 3'):
        separated(dict(a=[1, 2], b=[1, 2, 3]))


@pytest.mark.parametrize(('sd', 'effect'), [(1, 1), (2.5, 3), (0.9, 2)])
def test_required_seeds_reach_the_power_in_a_simulation(sd, effect):
    n = required_seeds(sd, effect)
    rng = np.random.default_rng(2)
    for seeds, reaches in ((n, True), (n - 1, False)):
        draws = rng.normal(effect, sd, (200_000, seeds))
        # The critical value from t² = F: found by simulation as well.
        null = rng.normal(0, sd, (200_000, seeds))
        critical = np.quantile(np.abs(student(null)), 0.95)
        power = np.mean(np.abs(student(draws)) > critical)
        assert (power > 0.9) == reaches


def student(draws):
    """Student's t of each row."""
    error = draws.std(1, ddof=1) / math.sqrt(draws.shape[1])
    return draws.mean(1) / error


def test_required_seeds_of_the_tables():
    # Cohen's d = 0.5 and 0.2, two-sided 5 %, power 0.8: 34 and 199 pairs
    assert required_seeds(2, 1, power=0.8) == 34
    assert required_seeds(5, 1, power=0.8) == 199
    assert required_seeds(2, -1, power=0.8) == 34


def test_required_seeds_are_never_fewer_than_two():
    assert required_seeds(0, 1) == 2
    assert required_seeds(1e-9, 10) == 2


@pytest.mark.parametrize(
    'given',
    [
        dict(sd=1, effect=0),
        dict(sd=-1, effect=1),
        dict(sd=1, effect=1, power=1),
    ],
)
def test_no_number_of_seeds_answers_these(given):
    with pytest.raises(ValueError, match='required_seeds needs'):
        required_seeds(**given)


def test_methods_are_ranked_where_every_pair_separates():
    rng = np.random.default_rng(3)
    seed = rng.normal(0, 5, 6)  # shared by all arms, so it cancels
    noise = rng.normal(0, 0.1, (5, 6))
    means = dict(low=10, top=30, mid=20, near=20, next=30)
    scores = {
        name: mean + seed + one
        for (name, mean), one in zip(means.items(), noise)
    }
    groups = separated(scores)
    assert [set(group) for group in groups] == [
        {'top', 'next'},
        {'mid', 'near'},
        {'low'},
    ]
    baseline = rng.normal(0, 20, 6)
    moved = {name: one - baseline for name, one in scores.items()}
    assert separated(moved) == groups


def test_a_noisy_method_between_two_keeps_them_in_one_group():
    # a and c differ by exactly 2 ± 0.1, b from neither.
    a = np.array([12.1, 11.9, 12.1, 11.9])
    c = np.array([10.0, 10.0, 10.0, 10.0])
    b = np.array([1.0, 21.0, 2.0, 20.0])
    assert separated(dict(c=c, b=b, a=a)) == [['a', 'b', 'c']]
    assert separated(dict(c=c, a=a)) == [['a'], ['c']]


def test_a_line_has_every_method_above_apart_from_every_one_below():
    # b and c are neighbours that differ by 2 ± 0.1; a, on top, is noise.
    c = np.array([10.0, 10.0, 10.0, 10.0])
    b = np.array([12.1, 11.9, 12.1, 11.9])
    a = np.array([1.0, 31.0, 2.0, 30.0])
    assert separated(dict(a=a, b=b, c=c)) == [['a', 'b', 'c']]
    assert separated(dict(b=b, c=c)) == [['b'], ['c']]


def test_the_more_methods_the_more_evidence_a_rank_needs():
    d = np.array([1.0, 2.0, 3.0, 4.0, 0.5])
    assert 0.05 / 3 < paired_p(d) < 0.05
    alone = dict(a=d, b=0 * d)
    assert separated(alone) == [['a'], ['b']]
    third = d.mean() / 2 + np.array([9, -9, 9, -9, 0.0])
    assert len(separated(dict(alone, third=third))) == 1


def test_one_seed_ranks_nothing():
    assert separated(dict(a=[1], b=[9])) == [['b', 'a']]
    assert separated({}) == []


def test_percentiles_leave_out_what_the_level_says():
    draws = np.arange(101.0)
    one = percentile_interval(42, draws, level=0.9)
    assert (one.low, one.high) == pytest.approx((5, 95))
    assert (one.mean, one.n) == (42, 101)
    # variance of 0 … m−1 with n − 1: m (m + 1) / 12
    assert one.sd == pytest.approx(math.sqrt(101 * 102 / 12))


def test_draws_without_a_value_do_not_count():
    draws = [1, math.nan, 3]
    assert percentile_interval(2, draws).n == 2
    assert math.isnan(percentile_interval(2, [math.nan, 1]).low)
