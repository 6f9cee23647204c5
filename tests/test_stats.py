from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from reference.plain_study import bootstrap_drop, p_above_0, resampled

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.bootstrap import Bootstrap, Interval
from mechdiff_mlflow.measures.stats import (
    Correlation,
    correlation,
    drop_difference,
    drop_pct,
    holm,
    kl_difference,
    mean,
    min_k,
    p_less_kl,
    permutation_p,
)

FEW = Bootstrap(n_resamples=499, seed=3)
SEED_KEYWORD = "rng" if "rng" in inspect.signature(scipy.stats.bootstrap).parameters else "random_state"
KL = st.lists(st.floats(0, 50), min_size=2, max_size=12)


def prompts(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    raw = rng.lognormal(0, 1.2, n)
    return raw, raw * rng.uniform(0.1, 1.2, n)


def scipys(data: tuple[np.ndarray, ...], statistic: Any) -> tuple[float, float]:
    found = scipy.stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=FEW.n_resamples,
        **{SEED_KEYWORD: np.random.default_rng(FEW.seed)},
    ).confidence_interval
    return found.low, found.high


def ends(a: np.ndarray, b: np.ndarray, room: float) -> tuple[float, float]:
    """The interval of Σa/Σb as the books write it, stretched towards 0."""
    found = resampled(a, b, seed=FEW.seed, n_resamples=FEW.n_resamples)
    low, high = found.estimate - np.quantile(found.shifts / found.errors, [0.975, 0.025]) * found.error
    return (low - room, high) if found.estimate > 0 else (low, high + room)


def test_drop_is_a_ratio_of_means_with_a_studentised_interval() -> None:
    raw, mapped = prompts()
    found = drop_pct(raw, mapped, bootstrap=FEW)
    assert found.estimate == pytest.approx(100 * (1 - mapped.sum() / raw.sum()), rel=1e-12)
    assert found.estimate != pytest.approx(100 * (1 - mapped / raw).mean(), rel=1e-2)
    expected = bootstrap_drop(raw, mapped, seed=FEW.seed, n_resamples=FEW.n_resamples)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert found.level == 0.95
    rise = drop_pct(mapped, raw, bootstrap=FEW)
    expected = bootstrap_drop(mapped, raw, seed=FEW.seed, n_resamples=FEW.n_resamples)
    assert (rise.low, rise.high) == pytest.approx(expected, rel=1e-9)


def test_means_have_studentised_intervals_and_only_a_difference_makes_room_for_the_unseen() -> None:
    raw, mapped = prompts()
    gain = raw - mapped
    share = 1 - 0.025 ** (1 / len(raw))
    for a, b in ((raw, mapped), (mapped, raw)):
        found = kl_difference(a, b, bootstrap=FEW)
        assert found.estimate == pytest.approx((a - b).mean(), rel=1e-12)
        expected = ends(a - b, np.ones(len(a)), share * abs((a - b).mean()))
        assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    plain = mean(gain, bootstrap=FEW)
    assert (plain.low, plain.high) == pytest.approx(ends(gain, np.ones(len(gain)), 0), rel=1e-9)


def test_equal_values_are_their_own_interval_and_nearly_equal_ones_have_none() -> None:
    found = mean([0.1 + 0.2, 0.3, 0.3, 0.3 + 1e-17], bootstrap=FEW)
    assert (found.low, found.high) == pytest.approx((0.3, 0.3), abs=1e-15)
    assert mean([0.0, 0.0, 1.0], bootstrap=FEW) == Interval(pytest.approx(1 / 3), None, None, 0.95)


def test_correlation_has_scipys_interval() -> None:
    raw, mapped = prompts(15)
    found = correlation(raw, mapped, bootstrap=FEW)
    assert found.n == 15
    for name, interval in (("pearsonr", found.pearson), ("spearmanr", found.spearman)):
        of = getattr(scipy.stats, name)
        assert interval.estimate == pytest.approx(of(raw, mapped).statistic, rel=1e-12)

        def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1, of: Any = of) -> np.ndarray:
            pairs = zip(np.atleast_2d(a), np.atleast_2d(b), strict=True)
            return np.squeeze([of(u, v).statistic for u, v in pairs])

        assert (interval.low, interval.high) == pytest.approx(scipys((raw, mapped), statistic), rel=1e-9)


def test_intervals_are_seeded_and_widen_with_the_level() -> None:
    raw, mapped = prompts()
    one = drop_pct(raw, mapped, bootstrap=FEW)
    assert one == drop_pct(raw, mapped, bootstrap=FEW)
    assert one != drop_pct(raw, mapped, bootstrap=Bootstrap(499, seed=4))
    wide = drop_pct(raw, mapped, bootstrap=Bootstrap(499, level=0.99, seed=3))
    assert one.low is not None
    assert wide.low is not None
    assert wide.low < one.low
    assert wide.level == 0.99


@pytest.mark.slow
@pytest.mark.parametrize("n", [40, 150])
def test_intervals_cover_as_often_as_they_say_where_a_few_prompts_fail(n: int) -> None:
    """On 3 % of prompts the map does as the raw patch, and 40 prompts may have none of these.

    The percentile interval covers 65 % at n=40 and 88 % at n=150.
    """
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        raw = rng.lognormal(0.5, 0.6, n)
        return raw, np.where(rng.random(n) < 0.03, raw, raw * rng.lognormal(-3, 0.7, n))

    truth = 100 * (1 - 0.03 - 0.97 * math.exp(-3 + 0.7**2 / 2))
    found = [drop_pct(*draw(n), bootstrap=Bootstrap(999)) for _ in range(300)]
    covered = np.mean([i.low <= truth <= i.high for i in found if i.low is not None and i.high is not None])
    assert covered >= 0.93
    assert np.mean([i.low is None for i in found]) < 0.05


# The undefined is None, never infinite


@given(KL, KL, st.floats(0, 5))
def test_drop_is_finite_or_none(raw: list[float], mapped: list[float], noise_floor: float) -> None:
    n = min(len(raw), len(mapped))
    found = drop_pct(raw[:n], mapped[:n], noise_floor=noise_floor, bootstrap=Bootstrap(50))
    defined = np.mean(raw[:n]) >= 10 * noise_floor and np.mean(raw[:n]) > 1e-300
    assert found.estimate is not None if defined and max(mapped[:n]) < 1e-3 else True
    assert all(v is None or math.isfinite(v) for v in (found.estimate, found.low, found.high))
    assert found.estimate is not None or found.low is None
    if np.mean(raw[:n]) < 10 * noise_floor:
        assert found == Interval(None, None, None, 0.95)


def test_a_reference_that_resamples_may_miss_has_no_bounds() -> None:
    found = drop_pct([0.0] * 9 + [1.0], [0.1] * 10, bootstrap=FEW)
    assert found == Interval(0.0, None, None, 0.95)
    assert drop_pct([0.0, 0.0], [1.0, 1.0]).estimate is None
    assert drop_pct([1e-320, 1e-320], [1.0, 1.0]).estimate is None


def test_the_noise_floor_counts_ten_times() -> None:
    raw, mapped = [1.0, 1.0], [0.5, 0.5]
    assert drop_pct(raw, mapped, noise_floor=0.1).estimate == 50.0
    assert drop_pct(raw, mapped, noise_floor=0.11).estimate is None
    assert min_k([1], raw, [mapped], target_pct=30, noise_floor=0.11) is None


def test_correlation_with_a_constant_is_undefined() -> None:
    undefined = Interval(None, None, None, 0.95)
    assert correlation([0.1] * 5, [1, 2, 3, 4, 5]) == Correlation(undefined, undefined, 5)
    sometimes = correlation([0.0, 0.0, 1.0], [1.0, 2.0, 3.0], bootstrap=FEW)
    assert sometimes.pearson.estimate is not None
    assert sometimes.pearson.low is None


# The smallest rank


def table(*drops: float, n: int = 20) -> list[list[float]]:
    return [[1 - drop / 100] * n for drop in drops]


def test_min_k_needs_all_larger_ranks_to_reach() -> None:
    raw = [1.0] * 20
    found = min_k([1, 8, 32, 64], raw, table(40, 10, 38, 50), target_pct=30)
    assert found is not None
    assert (found.k, found.low, found.high, found.conservative_k, found.p_reached) == (32, 32, 32, 32, 1.0)
    assert [drop.estimate for drop in found.drops] == pytest.approx([40, 10, 38, 50])


def test_min_k_of_what_the_largest_rank_does_not_reach_is_none() -> None:
    found = min_k([1, 8, 32], [1.0] * 20, table(40, 50, 29), target_pct=30)
    assert found is not None
    assert (found.k, found.low, found.high, found.conservative_k, found.p_reached) == (
        None,
        None,
        None,
        None,
        0.0,
    )


def test_min_k_takes_ranks_in_any_order() -> None:
    raw, mapped = prompts()
    rows = [mapped * f for f in (1.1, 0.8, 0.7)]
    rising = min_k([1, 8, 32], raw, rows, target_pct=40, bootstrap=FEW)
    assert rising == min_k([32, 1, 8], raw, [rows[2], rows[0], rows[1]], target_pct=40, bootstrap=FEW)


def test_min_k_interval_is_that_of_resampled_prompts() -> None:
    raw, mapped = prompts(30, seed=1)
    ks, rows = [1, 4, 16, 64], np.stack([mapped * f for f in (1.3, 1.1, 1.0, 0.85)])
    target = 33.0
    found = min_k(ks, raw, rows, target_pct=target, bootstrap=FEW)
    assert found is not None

    def first(order: np.ndarray) -> float:
        drops = [100 * (1 - row[order].sum() / raw[order].sum()) for row in rows]
        starts = [k for i, k in enumerate(ks) if all(d >= target for d in drops[i:])]
        return min(starts, default=math.inf)

    drawn = np.random.default_rng(FEW.seed).integers(0, 30, (FEW.n_resamples, 30))
    resampled = sorted(first(order) for order in drawn)
    assert found.k == first(np.arange(30))
    low, high = resampled[math.ceil(0.025 * 499) - 1], resampled[math.ceil(0.975 * 499) - 1]
    assert (found.low, found.high) == (low, None if math.isinf(high) else high)
    assert found.p_reached == np.mean(np.isfinite(resampled))
    assert 0 < found.p_reached < 1
    assert found.low != found.high
    sure = [drop.low is not None and drop.low >= target for drop in found.drops]
    assert found.conservative_k == min((k for i, k in enumerate(ks) if all(sure[i:])), default=None)


@given(st.lists(st.floats(-50, 100), min_size=1, max_size=6), st.floats(-20, 90))
def test_conservative_k_is_never_smaller(drops: list[float], target: float) -> None:
    rng = np.random.default_rng(0)
    raw = rng.lognormal(size=12)
    rows = [raw * (1 - d / 100) * rng.uniform(0.8, 1.2, 12) for d in drops]
    found = min_k(range(1, len(drops) + 1), raw, rows, target_pct=target, bootstrap=Bootstrap(99))
    assert found is not None
    if found.conservative_k is not None:
        assert found.k is not None
        assert found.k <= found.conservative_k


# Tests


def test_the_test_of_a_mean_is_the_studentised_bootstraps() -> None:
    raw, mapped = prompts(12)
    assert p_less_kl(raw, mapped, bootstrap=Bootstrap(seed=3)) == pytest.approx(
        p_above_0(raw - mapped, seed=3), abs=1e-12
    )
    assert p_less_kl(mapped, raw) == 1.0
    assert p_less_kl(raw, raw) == 1.0


def test_a_test_of_few_prompts_is_never_surer_than_their_signs() -> None:
    assert p_less_kl([1.0] * 5, [0.5] * 5) == 1 / 32
    assert p_less_kl([1.0] * 20, [0.5] * 20) == 1 / 10_000


def test_the_test_of_a_mean_holds_its_level_where_a_test_of_symmetry_does_not() -> None:
    """Of a mean of 0 with many small gains and few large losses, which sign flips take for a gain."""
    rng = np.random.default_rng(0)
    gains = [math.exp(0.5) - rng.lognormal(0, 1, 150) for _ in range(400)]
    ones = [p_less_kl(gain, 0 * gain, bootstrap=Bootstrap(999)) <= 0.05 for gain in gains]
    flipped = [scipy.stats.ttest_1samp(gain, 0, alternative="greater").pvalue <= 0.05 for gain in gains]
    assert np.mean(ones) <= 0.08
    assert np.mean(flipped) > 0.1


def test_permutation_p_is_never_zero() -> None:
    assert permutation_p(0.0, [1.0] * 99) == 1 / 100
    assert permutation_p(1.0, [1.0, 0.5, 2.0]) == 3 / 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_step_down_procedure(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[i] * (len(p_values) - place) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p is not None and p <= level} == rejected


def test_holm_by_hand_and_without_the_untested() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([]) == []


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drop_pct([1.0], [1.0]), r"at least 2 prompts, not kl_reference \[1\], kl_mapped \[1\]"),
        (lambda: drop_pct([1, 2], [1, 2, 3]), r"kl_reference \[2\], kl_mapped \[3\]"),
        (lambda: kl_difference([1, np.nan], [1, 2]), "1 of 2 values of kl_raw are NaN or infinite"),
        (lambda: correlation([1, 2], [np.inf, 2]), "1 of 2 values of kl_decrease"),
        (lambda: holm([0.1, 1.2]), "1.2 is not a p-value"),
        (lambda: Bootstrap(0), "at least 1 resample"),
        (lambda: Bootstrap(level=1.0), "level between 0 and 1"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(MechdiffError, match=message):
        call()


def test_drop_difference_resamples_each_set_by_itself() -> None:
    rng = np.random.default_rng(3)
    first = rng.exponential(2.0, 40), rng.exponential(1.0, 40)
    second = rng.exponential(2.0, 25), rng.exponential(1.5, 25)
    found = drop_difference(first, second, bootstrap=Bootstrap(n_resamples=200, seed=5))
    one, other = (
        resampled(mapped, raw, seed=seed, n_resamples=200)
        for (raw, mapped), seed in ((first, 5), (second, 6))
    )
    gap = 100 * (other.estimate - one.estimate)
    t = (other.shifts - one.shifts) / np.hypot(one.errors, other.errors)
    low, high = gap - np.quantile(t, [0.975, 0.025]) * 100 * np.hypot(one.error, other.error)
    missed = (1 - 0.025 ** (1 / 25)) * 100 * (abs(1 - one.estimate) + abs(1 - other.estimate))
    expected = (low - missed, high) if gap > 0 else (low, high + missed)
    assert found.estimate == pytest.approx(gap, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)
    assert drop_difference(first, (0 * second[0], second[1])).estimate is None


def copies(values: np.ndarray, times: int) -> np.ndarray:
    return np.repeat(values, times)


def test_ten_copies_of_fifteen_prompts_are_fifteen_prompts() -> None:
    """Every interval and p-value of grouped copies is that of the prompts themselves."""
    rng = np.random.default_rng(1)
    raw, mapped, cos = rng.lognormal(size=15), rng.lognormal(-1, size=15), rng.normal(size=15)
    groups = tuple(np.repeat(np.arange(15), 10).tolist())
    one, many = Bootstrap(seed=3), Bootstrap(seed=3, groups=groups)
    for statistic in (drop_pct, kl_difference):
        alone = statistic(raw, mapped, bootstrap=one)
        grouped = statistic(copies(raw, 10), copies(mapped, 10), bootstrap=many)
        pretended = statistic(copies(raw, 10), copies(mapped, 10), bootstrap=one)
        assert [grouped.estimate, grouped.low, grouped.high] == pytest.approx(
            [alone.estimate, alone.low, alone.high], rel=1e-12
        )
        # What is counted ten times over looks three times as sure.
        assert (pretended.high - pretended.low) < 0.45 * (alone.high - alone.low)
    least = min_k([1, 2], raw, np.stack([mapped * 2, mapped]), target_pct=30, bootstrap=one)
    tenfold = np.stack([copies(mapped * 2, 10), copies(mapped, 10)])
    assert min_k([1, 2], copies(raw, 10), tenfold, target_pct=30, bootstrap=many).low == least.low
    tenfold_p = p_less_kl(copies(raw, 10), copies(mapped, 10), bootstrap=many)
    assert tenfold_p == p_less_kl(raw, mapped, bootstrap=one)
    assert tenfold_p > p_less_kl(copies(raw, 10), copies(mapped, 10), bootstrap=one)
    gap = drop_difference((raw, mapped), (mapped, raw), bootstrap=one)
    same = drop_difference(
        (copies(raw, 10), copies(mapped, 10)), (mapped, raw), bootstrap=one, groups=(groups, ())
    )
    assert (same.low, same.high) == pytest.approx((gap.low, gap.high), rel=1e-12)
    found = correlation(copies(cos, 10), copies(raw - mapped, 10), bootstrap=many)
    expected = correlation(cos, raw - mapped, bootstrap=one)
    assert (found.pearson.low, found.pearson.high) == pytest.approx(
        (expected.pearson.low, expected.pearson.high), rel=1e-9
    )
    assert found.spearman.low == pytest.approx(expected.spearman.low, rel=1e-9)


@given(st.lists(st.integers(0, 4), min_size=4, max_size=9).filter(lambda g: len({*g}) > 1))
def test_a_bootstrap_of_groups_draws_them_whole(groups: list[int]) -> None:
    """Against a slow one that lists every drawn prompt."""
    rng = np.random.default_rng(0)
    raw, mapped = rng.lognormal(size=len(groups)), rng.lognormal(size=len(groups))
    bootstrap = Bootstrap(n_resamples=50, groups=tuple(groups))
    members = [np.flatnonzero(np.array(groups) == g) for g in np.unique(groups)]
    drawn = np.random.default_rng(0).integers(0, len(members), (50, len(members)))
    samples = [np.concatenate([members[g] for g in row]) for row in drawn]
    means = [raw[rows].mean() for rows in samples]
    assert bootstrap.means(raw)[0] == pytest.approx(np.array(means), rel=1e-12)
    found = drop_pct(raw, mapped, bootstrap=bootstrap)
    if found.low is not None:
        low, high = bootstrap_drop(raw, mapped, seed=0, n_resamples=50, groups=groups)
        assert found.low == pytest.approx(low, rel=1e-7)
        # Where many resamples are of one group alone, nothing but 100 % bounds the drop.
        assert found.high == (100.0 if np.isnan(high) else pytest.approx(high, rel=1e-7))
    ranks = [scipy.stats.spearmanr(raw[rows], mapped[rows])[0] for rows in samples if np.ptp(raw[rows]) > 0]
    spearman = correlation(raw, mapped, bootstrap=bootstrap).spearman
    if len(ranks) == 50 and not np.isnan(ranks).any():
        assert (spearman.low, spearman.high) == pytest.approx(
            tuple(np.quantile(ranks, [0.025, 0.975])), rel=1e-9
        )


@pytest.mark.parametrize("times", [1, 10])
def test_intervals_of_groups_cover_as_those_of_single_prompts(times: int) -> None:
    """Coverage of a mean of 15 independent values, each seen `times` times with the same group."""
    rng = np.random.default_rng(5)
    groups = tuple(np.repeat(np.arange(15), times).tolist())
    hits = 0
    for _ in range(400):
        values = copies(rng.normal(1, 1, 15), times)
        found = mean(values, bootstrap=Bootstrap(999, groups=groups))
        hits += found.low <= 1 <= found.high
    assert 0.92 < hits / 400 < 0.98


def test_of_one_group_there_is_no_interval() -> None:
    found = kl_difference([1.0, 2.0], [0.5, 0.5], bootstrap=Bootstrap(groups=(0, 0)))
    assert (found.estimate, found.low, found.high) == (1.0, None, None)
