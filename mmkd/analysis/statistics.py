"""What a comparison over seeds shows, and what it leaves open.

A seed fixes initial weights, data and their order in every arm, so arms are
compared seed by seed: all numbers here rest on paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mmkd.checks import check_positive

__all__ = [
    'Interval',
    'Sign',
    'gap_closed',
    'holm',
    'paired_interval',
    'paired_p',
    'percentile_interval',
    'required_seeds',
    'separated',
    'sign_test',
]

Key = TypeVar('Key', bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """An estimate and the range that its uncertainty leaves.

    Args:
        mean: The estimate.
        low: Lower end; NaN if unknown, −∞ if there is none.
        high: Upper end.
        sd: Standard deviation of the values it rests on.
        n: How many these are.
        note: Why an end is unknown or unbounded.
    """

    mean: float
    low: float
    high: float
    sd: float
    n: int
    note: str = ''

    def as_dict(self) -> dict:
        """Fields for JSON, which has neither NaN nor ∞: None stands there."""
        return {
            key: None
            if isinstance(one, float) and not np.isfinite(one)
            else one
            for key, one in asdict(self).items()
        }


@dataclass(frozen=True)
class Sign:
    """Outcome of a sign test: seeds won, lost, tied, and its p-value."""

    wins: int
    losses: int
    ties: int
    p: float


def paired_interval(differences: ArrayLike, level: float = 0.95) -> Interval:
    r"""Mean of paired differences with its t interval.

    :math:`\bar d \pm t_{n-1}\, s / \sqrt n`: it covers the true mean in
    ``level`` of all repetitions if the differences are normal.

    Args:
        differences: One number a seed, (n,).
        level: Share of repetitions in which the interval covers.

    Returns:
        The mean; the ends are NaN for a single seed.

    Raises:
        ValueError: If there are no differences, or not all are finite.

    Example:
        >>> one = paired_interval([1.0, 2.0, 3.0])
        >>> round(one.low, 2), one.mean, round(one.high, 2)
        (-0.48, 2.0, 4.48)
    """
    values = _vector('paired_interval', differences)
    _check_level('paired_interval', level)
    n, mean = len(values), float(values.mean())
    if n == 1:
        nan = math.nan
        return Interval(mean, nan, nan, nan, 1, 'one seed has no spread')
    sd = float(values.std(ddof=1))
    half = _t(level, n) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def paired_p(differences: ArrayLike) -> float:
    """Two-sided p-value of Student's t-test that the mean difference is 0.

    Args:
        differences: One number a seed, (n,).

    Returns:
        NaN for a single seed. Without any spread it is 0, or 1 if all
        differences are 0.
    """
    values = _vector('paired_p', differences)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return math.nan
    error = float(values.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, n - 1))


def sign_test(differences: ArrayLike) -> Sign:
    """Exact two-sided test that wins and losses are equally likely.

    It asks only how often, not by how much, and assumes no distribution. Ties
    are left out. Fewer than six seeds cannot reach 0.05.

    Example:
        >>> sign_test([0.4, 1.0, 2.5, 0.1, 3.0, 0.2])
        Sign(wins=6, losses=0, ties=0, p=0.03125)
    """
    values = _vector('sign_test', differences)
    wins, losses = int((values > 0).sum()), int((values < 0).sum())
    decided = wins + losses
    p = float(stats.binomtest(wins, decided).pvalue) if decided else 1.0
    return Sign(wins, losses, len(values) - decided, p)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    r"""Holm's step-down adjustment for several tests.

    The i-th smallest of m p-values is multiplied by :math:`m - i + 1`, and
    none may fall below the one before. What is at most 0.05 afterwards holds
    together: the chance of any false claim is at most 5 %.

    Args:
        p_values: By name. NaN stands for a test that could not be made: it
            stays NaN and does not count.

    Returns:
        Adjusted p-values, in the order given.

    Reference:
        Holm, "A simple sequentially rejective multiple test procedure",
        Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm(dict(a=0.01, b=0.04, c=0.03))
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted = {name: float(p) for name, p in p_values.items()}
    made = [name for name, p in adjusted.items() if not math.isnan(p)]
    before = 0.0
    for index, name in enumerate(sorted(made, key=adjusted.__getitem__)):
        before = max(before, min(1.0, (len(made) - index) * adjusted[name]))
        adjusted[name] = before
    return adjusted


def gap_closed(
    distilled: ArrayLike,
    alone: ArrayLike,
    teacher: float,
    level: float = 0.95,
) -> Interval:
    r"""Share of the gap to the teacher that distillation closes.

    With the gain :math:`x_s = d_s - a_s` and the gap :math:`y_s = T - a_s` of
    each seed, the share is :math:`\rho = \bar x / \bar y`: 0 is the student
    alone, 1 the teacher. The interval is Fieller's: all :math:`\rho` for which
    a t-test on :math:`x_s - \rho\, y_s` does not reject mean zero. Unlike the
    delta method, it is exact for normal APs however large the gap's own
    uncertainty, and it respects that :math:`a_s` is in both x and y. The
    teacher is one number: its own seeds are not part of the uncertainty.

    Args:
        distilled: AP of the distilled student, one a seed, (n,).
        alone: AP of the student alone, same seeds, (n,).
        teacher: AP of the teacher.
        level: Share of repetitions in which the interval covers.

    Returns:
        The share; ``sd`` is that of :math:`(x_s - \rho\, y_s) / \bar y`. Ends
        are −∞ and ∞ if the gap itself cannot be told from zero, and all is NaN
        if the teacher is not above the student; ``note`` says so.

    Raises:
        ValueError: If the arms have different numbers of seeds, or none.

    Reference:
        Fieller, "Some problems in interval estimation", Journal of the Royal
        Statistical Society B 16, 1954.
    """
    distilled = _vector('gap_closed', distilled)
    alone = _vector('gap_closed', alone)
    _check_paired('gap_closed', dict(distilled=distilled, alone=alone))
    _check_level('gap_closed', level)
    n, nan = len(alone), math.nan
    gain, gap = distilled - alone, teacher - alone
    if not gap.mean() > 0:
        return Interval(
            *(nan, nan, nan, nan),
            n,
            f'there is no gap: the teacher ({teacher:g}) is not above the '
            f'student alone ({alone.mean():g})',
        )
    share = float(gain.mean() / gap.mean())
    if n == 1:
        return Interval(share, nan, nan, nan, 1, 'one seed has no spread')
    sd = float((gain - share * gap).std(ddof=1) / gap.mean())
    # (x̄ − ρȳ)² ≤ (t²/n) (s_xx − 2ρ s_xy + ρ² s_yy), a quadratic in ρ
    (xx, xy), (_, yy) = np.cov(gain, gap) * _t(level, n) ** 2 / n
    a = gap.mean() ** 2 - yy
    b = gain.mean() * gap.mean() - xy
    c = gain.mean() ** 2 - xx
    if a <= 0:
        note = 'unbounded: the gap cannot be told from zero'
        return Interval(share, -math.inf, math.inf, sd, n, note)
    # Not negative but for rounding, as the share itself fulfils it.
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(share, float((b - root) / a), float((b + root) / a), sd, n)


def required_seeds(
    sd: float, effect: float, power: float = 0.9, level: float = 0.95
) -> int:
    r"""Seeds that a paired t-test needs to find an effect.

    The smallest :math:`n \ge 2` at which the noncentral t distribution with
    :math:`n - 1` degrees of freedom and noncentrality
    :math:`\sqrt n \cdot \text{effect} / \text{sd}` lies beyond the two-sided
    critical values with probability ``power``.

    Args:
        sd: Standard deviation of the differences, from pilot seeds.
        effect: True mean difference that shall be found.
        power: Probability of finding it.
        level: One minus the size of the test.

    Example:
        >>> required_seeds(sd=1.0, effect=1.0, power=0.8)
        10
    """
    check_positive('required_seeds', effect=abs(effect))
    _check_level('required_seeds', level)
    if not (0 < power < 1 and sd >= 0):
        raise ValueError(
            f'required_seeds needs sd >= 0 and power inside (0, 1), got '
            f'sd={sd!r}, power={power!r}.'
        )
    if sd == 0:
        return 2

    def enough(n: int) -> bool:
        critical = _t(level, n)
        # From 100 times the critical value on the power is 1 in any case, and
        # SciPy's distribution has limits.
        shift = min(math.sqrt(n) * abs(effect) / sd, 100 * critical)
        beyond = stats.nct(n - 1, shift)
        # SciPy gives NaN for a far tail that is smaller than its own error.
        wrong_side = np.nan_to_num(beyond.cdf(-critical))
        return beyond.sf(critical) + wrong_side >= power

    few, many = 1, 2
    while not enough(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def separated(
    scores: Mapping[str, ArrayLike], level: float = 0.95
) -> list[list[str]]:
    """Rank methods only as far as their seeds can tell them apart.

    All pairs are compared by a paired t-test, and the p-values adjusted by
    :func:`holm`. In the order of means a line is drawn wherever *every* method
    above it differs from *every* method below it; the methods between two
    lines form a group, within which there is no ranking.

    Args:
        scores: By method, one number a common seed, (n,): APs, or their
            differences to one baseline, which ranks the same.
        level: One minus the chance of any false claim.

    Returns:
        Groups of names, best first; within a group by mean.

    Raises:
        ValueError: If methods have different numbers of seeds, or none.

    Example:
        >>> separated(dict(a=[1, 2, 3], b=[9, 8, 9], c=[1, 3, 2]))
        [['b'], ['a', 'c']]
    """
    _check_level('separated', level)
    vectors = {name: _vector('separated', one) for name, one in scores.items()}
    _check_paired('separated', vectors)
    order = sorted(vectors, key=lambda name: -vectors[name].mean())
    adjusted = holm(
        {
            pair: paired_p(vectors[pair[0]] - vectors[pair[1]])
            for pair in combinations(order, 2)
        }
    )
    groups: list[list[str]] = []
    for index, name in enumerate(order):
        line = all(
            adjusted[upper, lower] <= 1 - level
            for upper in order[:index]
            for lower in order[index:]
        )
        if line:
            groups.append([])
        groups[-1].append(name)
    return groups


def percentile_interval(
    estimate: float, draws: ArrayLike, level: float = 0.95
) -> Interval:
    """The middle ``level`` of bootstrap draws around an estimate.

    Args:
        estimate: From the data as they are.
        draws: The same number from resampled data, (n,); NaN where a draw
            had none.
        level: Share of draws inside.

    Returns:
        ``sd`` is that of the draws, hence the estimate's standard error, and
        ``n`` the number of draws that count.
    """
    _check_level('percentile_interval', level)
    draws = np.asarray(draws, float)
    draws = draws[~np.isnan(draws)]
    if len(draws) < 2:
        nan = math.nan
        return Interval(estimate, nan, nan, nan, len(draws), 'no draws')
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        float(estimate),
        float(low),
        float(high),
        float(draws.std(ddof=1)),
        len(draws),
    )


def _t(level: float, n: int) -> float:
    """Two-sided critical value of n numbers."""
    return float(stats.t.isf((1 - level) / 2, n - 1))


def _vector(who: str, values: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f'{who} needs one finite number per seed and at least one seed, '
            f'got {values.tolist()}.'
        )
    return values


def _check_paired(who: str, arms: Mapping[str, Sequence]) -> None:
    if len({len(one) for one in arms.values()}) > 1:
        counts = ', '.join(f'{name}: {len(one)}' for name, one in arms.items())
        raise ValueError(
            f'{who} compares arms seed by seed, got seeds {counts}. Keep the '
            f'seeds that all of them have.'
        )


def _check_level(who: str, level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(
            f'{who} needs level inside (0, 1), got level={level!r}.'
        )
