"""Intervals and tests against scipy, statsmodels, closed forms, brute force; degenerate data have an answer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from bem_peft.evaluation.exact_tests import mcnemar_p_value, sign_flip_p_value
from bem_peft.evaluation.intervals import compare_means
from bem_peft.evaluation.resampling import bootstrap_means
from bem_peft.evaluation.variance import variance_parts


def study(seeds: int, items: int, effect: float = 0.0, spread: float = 0.02, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    parts = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.3, (1, items)) + rng.normal(0, 0.4, (seeds, items))
    return effect + parts


def by_hand(difference: np.ndarray) -> tuple[float, float, float, float]:
    """estimate, standard error, df, skewness of the mean, in plain Python."""
    seeds, items = len(difference), len(difference[0])
    mean = sum(map(sum, difference)) / (seeds * items)
    columns = [sum(row[i] for row in difference) / seeds for i in range(items)]
    rows = [sum(row) / items for row in difference]
    v_i = sum((c - mean) ** 2 for c in columns) / (items - 1) / items
    v_s = sum((r - mean) ** 2 for r in rows) / (seeds - 1) / seeds
    v_c = sum((x - mean) ** 2 for row in difference for x in row) / (seeds * items) ** 2
    variance = max(v_i + v_s - v_c, v_i, v_s)
    squares = [(c - mean) ** 2 for c in columns]
    second, fourth = sum(squares) / items, sum(s * s for s in squares) / items
    df_i = max(1.0, min(items - 1, 2 * items / (fourth / second**2 - 1)))
    df = variance**2 / (v_i**2 / df_i + v_s**2 / (seeds - 1))
    cubes = sum((c - mean) ** 3 for c in columns) / sum(squares) ** 1.5
    return mean, math.sqrt(variance), df, cubes * (v_i / variance) ** 1.5


@pytest.mark.parametrize(("seeds", "items"), [(3, 3), (3, 40), (5, 200)])
def test_two_way_interval_is_the_formula(seeds: int, items: int) -> None:
    difference = study(seeds, items, effect=0.05)
    estimate, error, df, skewness = by_hand(difference.tolist())
    found = compare_means(difference)
    assert (found.estimate, found.standard_error, found.df) == pytest.approx((estimate, error, df), rel=1e-9)

    def transformed(mean: float) -> float:
        t = (estimate - mean) / error
        return t + skewness * t**2 / 3 + skewness**2 * t**3 / 27 + skewness / 6

    edge = stats.t.ppf(0.975, df)
    ends = [optimize.brentq(lambda m, e=e: transformed(m) - e, estimate - 99, estimate + 99) for e in (edge, -edge)]
    plain = stats.t.interval(0.95, df, loc=estimate, scale=error)
    assert found.low == pytest.approx(min(ends[0], plain[0]), rel=1e-6)
    assert found.high == pytest.approx(max(ends[1], plain[1]), rel=1e-6)
    both = [2 * stats.t.sf(abs(t), df) for t in (transformed(0.0), estimate / error)]
    assert found.p_value == pytest.approx(max(both), rel=1e-9)
    assert not found.is_conditional


def test_standard_error_is_that_of_two_way_clustered_regression() -> None:
    """statsmodels: OLS on a constant, errors clustered by seed and by item."""
    difference = study(4, 60, effect=0.1)
    groups = np.array([(k, i) for k in range(4) for i in range(60)])
    model = sm.OLS(difference.ravel(), np.ones(240)).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    parts = variance_parts(difference)
    # without the small-sample factors n / (n - 1) of two of the variances
    ours = parts.items * 59 / 60 + parts.seeds * 3 / 4 - parts.both
    assert float(model.bse[0]) ** 2 == pytest.approx(ours, rel=1e-6)


def test_two_seeds_have_a_t_for_each_part() -> None:
    rng = np.random.default_rng(0)
    half = rng.normal(0, 0.5, 40)
    difference = np.array([[0.3], [-0.2]]) + np.concatenate([half, -half])  # symmetric: no skewness
    parts, found = variance_parts(difference), compare_means(difference)
    own = stats.t.ppf(0.975, parts.items_df) ** 2 * parts.items + stats.t.ppf(0.975, 1) ** 2 * (
        parts.seeds - parts.both
    )
    assert found.high - found.estimate == pytest.approx(math.sqrt(own), rel=1e-6)
    assert "two seeds" in found.method
    assert found.refusal == "two seeds: how far seeds differ is known on one degree of freedom; run a third"


def test_few_effective_clusters_bear_no_claim_and_one_seed_has_the_jackknife() -> None:
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(10), [400] + [10] * 9)
    for seeds in (1, 3):
        difference = 1.0 + rng.normal(0, 0.1, (seeds, len(clusters)))
        found = compare_means(difference, clusters)
        assert found.refusal is not None
        assert found.refusal.startswith("too few effective clusters: 1.5 of 10, the largest holds 82% of the items (")
        assert not found.may_claim
    assert "jackknife" in compare_means(difference[:1], clusters).method
    equal = compare_means(rng.normal(1.0, 0.1, (3, 120)), np.repeat(np.arange(12), 10))
    assert (equal.refusal, equal.may_claim, equal.clusters) == (None, True, 12)
    few = np.zeros((3, 500))
    few[:, :2] = [[1.0, 0.7]] * 3
    assert "too few effective items" in str(compare_means(few).refusal)


def test_one_seed_is_scipys_bca_and_says_that_it_is_conditional() -> None:
    row = np.random.default_rng(2).exponential(1.0, 80) - 0.8
    found = compare_means(row[None, :], resamples=4_999)
    expected = stats.bootstrap(
        (row,), np.mean, method="BCa", n_resamples=4_999, rng=np.random.default_rng(0)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.is_conditional
    assert "conditional on this seed" in found.method
    assert found.df is None


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_sign_flip_counts_every_pattern_at_least_as_extreme(values: list[int]) -> None:
    row = np.array(values, dtype=float)
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    assert sign_flip_p_value(row) == pytest.approx(np.mean([s >= abs(sum(values)) for s in sums]))


def test_sign_flip_is_scipys_permutation_test() -> None:
    row = study(1, 60, effect=0.1)[0]
    expected = stats.permutation_test(
        (row, -row), lambda x, y, axis: np.mean(x - y, axis=axis) / 2, permutation_type="samples", n_resamples=9_999,
        vectorized=True, rng=np.random.default_rng(3),
    ).pvalue  # fmt: skip
    assert sign_flip_p_value(row, random_seed=5) == pytest.approx(expected, abs=0.015)
    assert sign_flip_p_value(np.full(40, 1.0)) == pytest.approx(1 / 10_000)  # never 0
    assert sign_flip_p_value(np.zeros(40)) == 1.0


def test_mcnemar_is_the_binomial_on_split_items() -> None:
    a, b = np.array([1] * 12 + [0] * 3 + [1] * 20 + [0] * 5), np.array([0] * 12 + [1] * 3 + [1] * 20 + [0] * 5)
    table = [[20, 12], [3, 5]]
    from statsmodels.stats.contingency_tables import mcnemar

    assert mcnemar_p_value(a, b) == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert mcnemar_p_value(a, a) == 1.0
    with pytest.raises(ValueError, match="zeros and ones"):
        mcnemar_p_value(a * 0.5, b)
    with pytest.raises(ValueError, match="same ones"):
        mcnemar_p_value(a[:-1], b)


def test_degenerate_data_have_defined_answers() -> None:
    same = compare_means(np.zeros((4, 10)))
    assert (same.estimate, same.low, same.high, same.p_value, same.d_z) == (0.0, 0.0, 0.0, 1.0, None)
    constant = compare_means(np.full((4, 10), 0.3))
    assert (constant.low, constant.high) == pytest.approx((0.3, 0.3))
    assert constant.p_value == 2.0**-3
    one = compare_means(np.full((1, 10), 0.3))
    assert (one.low, one.high, one.p_value, one.is_conditional) == (
        pytest.approx(0.3),
        pytest.approx(0.3),
        2.0**-9,
        True,
    )
    assert compare_means(np.zeros((1, 10))).p_value == 1.0


@pytest.mark.parametrize(
    ("difference", "options", "text"),
    [
        (np.zeros((3, 2)), {}, "2 items: at least 3"),
        (np.zeros(5), {}, "must be (seeds, items)"),
        (np.full((2, 5), np.nan), {}, "not finite"),
        (np.full((2, 5), np.inf), {}, "not finite"),
        (np.zeros((2, 5)), {"clusters": np.zeros(4)}, "one an item"),
        (np.zeros((2, 5)), {"clusters": np.array([0, 0, 0, 1, 1])}, "2 clusters: at least 3"),
        (np.zeros((2, 5)), {"confidence": 95}, "`confidence` = 95"),
        (np.zeros((2, 5)), {"power": 0.0}, "`power` = 0.0"),
    ],
)
def test_what_has_no_answer_is_refused(difference: np.ndarray, options: dict, text: str) -> None:
    import re

    with pytest.raises(ValueError, match=re.escape(text)):
        compare_means(difference, **options)


def test_the_minimum_detectable_effect_is_found_as_often_as_the_power_says() -> None:
    mde = compare_means(study(5, 200, seed=11)).mde
    found = np.mean([compare_means(study(5, 200, effect=mde, seed=s)).p_value < 0.05 for s in range(300)])
    assert 0.65 < found < 0.95


def test_bootstrap_of_seeds_and_items_has_the_two_way_variance() -> None:
    """Drawing both again has the variance v_i + v_s of the formula, and v_c / (K N) more."""
    difference = study(6, 80, spread=0.1)
    means = bootstrap_means(difference, resamples=20_000)
    assert means.mean() == pytest.approx(difference.mean(), abs=0.005)
    centred = difference - difference.mean(0) - difference.mean(1)[:, None] + difference.mean()
    expected = difference.mean(0).var() / 80 + difference.mean(1).var() / 6 + centred.var() / 480
    assert means.var() == pytest.approx(expected, rel=0.05)


@given(st.integers(2, 5), st.integers(3, 12), st.floats(-3, 3), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_shifting_and_scaling_move_the_interval_with_them(seeds: int, items: int, shift: float, scale: float) -> None:
    difference = study(seeds, items, seed=seeds * 31 + items)
    base, moved = compare_means(difference), compare_means(difference * scale + shift)
    for name in ("estimate", "low", "high"):
        assert getattr(moved, name) == pytest.approx(getattr(base, name) * scale + shift, rel=1e-6, abs=1e-6)
    assert compare_means(-difference).p_value == pytest.approx(base.p_value)
