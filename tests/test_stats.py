"""Intervals against scipy's bootstrap, closed forms and coverage; pairing and flips against hand counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.stats import bootstrap, flips, interval, paired_difference, ratio

scipy_stats = pytest.importorskip("scipy.stats")


def test_mean_interval_is_scipys_percentile_interval():
    x = np.random.default_rng(0).gamma(2.0, size=150)
    theirs = scipy_stats.bootstrap(
        (x,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = interval(x, n=40_000, seed=2)
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.03 * width
    assert abs(high - theirs.high) < 0.03 * width


def test_ratio_interval_is_scipys_paired_interval_and_not_the_mean_of_ratios():
    rng = np.random.default_rng(3)
    den = rng.integers(1, 400, size=120).astype(float)
    num = den * rng.normal(1.0, 0.3, size=120) + rng.normal(30, 5, size=120)  # short items score high
    theirs = scipy_stats.bootstrap(
        (num, den),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        n_resamples=40_000,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    low, high = interval(num / den, weights=den, n=40_000)
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.03 * width
    assert abs(high - theirs.high) < 0.03 * width
    assert not low < np.mean(num / den) < high


def test_difference_interval_is_scipys_paired_interval():
    rng = np.random.default_rng(4)
    hard = rng.normal(size=200)
    a, b = hard + rng.normal(0, 0.2, 200), hard + 0.1 + rng.normal(0, 0.2, 200)
    ids = [str(i) for i in range(200)]
    ours = paired_difference(dict(zip(ids, a, strict=True)), dict(zip(ids, b, strict=True)), n=40_000)
    theirs = scipy_stats.bootstrap(
        (b - a,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.difference == pytest.approx(np.mean(b - a))
    assert abs(ours.low - theirs.low) < 0.03 * width
    assert abs(ours.high - theirs.high) < 0.03 * width
    unpaired = interval(a)[1] - interval(a)[0]
    assert ours.high - ours.low < unpaired / 2  # what pairing is for


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        low, high = interval(rng.exponential(size=80), n=400, seed=trial, level=0.9)
        hits += low <= 1.0 <= high
    assert 0.83 < hits / 300 < 0.95


def test_general_statistic_and_fast_path_agree():
    rows = np.random.default_rng(6).random((60, 2)) + 0.5
    slow = bootstrap(lambda r: r[:, 0].sum() / r[:, 1].sum(), rows, n=8000, additive=False)
    fast = bootstrap(ratio, rows, n=8000)
    assert slow == pytest.approx(fast, abs=0.01)


def test_a_median_has_an_interval_too():
    x = np.random.default_rng(7).normal(5, 1, 400)
    low, high = bootstrap(np.median, x, n=2000, additive=False)
    assert low < 5.1
    assert high > 4.9
    assert 0.1 < high - low < 0.5  # 2 * 1.96 * 1.2533 / 20 = 0.25


@pytest.mark.parametrize("n", [1, 5, 12, 200])
def test_all_right_and_all_wrong_have_clopper_pearson_width(n):
    for k, scores in ((n, np.ones(n)), (0, np.zeros(n))):
        theirs = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="exact")
        assert interval(scores) == pytest.approx((theirs.low, theirs.high))


def test_one_item_that_is_no_zero_or_one_keeps_its_point():
    assert interval([0.4]) == (0.4, 0.4)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 5), st.randoms())
@settings(max_examples=60, deadline=None)
def test_order_does_not_matter_and_the_interval_stays_inside_the_scores(scores, seed, random):
    low, high = interval(scores, n=200, seed=seed)
    mixed = list(scores)
    random.shuffle(mixed)
    assert interval(mixed, n=200, seed=seed) == (low, high)
    if set(scores) not in ({0.0}, {1.0}):
        slack = 1e-9 * max(map(abs, scores)) + 1e-9
        assert min(scores) - slack <= low <= high <= max(scores) + slack


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20))
@settings(max_examples=40, deadline=None)
def test_swapping_sides_negates_the_difference(pairs):
    a = {str(i): x for i, (x, _) in enumerate(pairs)}
    b = {str(i): y for i, (_, y) in enumerate(pairs)}
    there, back = paired_difference(a, b, n=101), paired_difference(b, a, n=101)
    assert there.difference == pytest.approx(-back.difference, abs=1e-12)
    assert paired_difference(a, a, n=50).high == 0.0 == paired_difference(a, a, n=50).low


def test_seeds_are_private_and_matter():
    x = np.random.default_rng(8).random(50)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    assert interval(x, seed=1) == interval(x, seed=1) != interval(x, seed=2)
    assert (np.random.get_state()[1] == before).all()


def test_blocks_of_resamples_change_nothing(monkeypatch):
    import residency.stats as stats

    x = np.random.default_rng(9).random(100)
    whole = interval(x, n=500)
    real = np.random.default_rng
    monkeypatch.setattr(stats.np.random, "default_rng", lambda seed: real(seed))
    source = stats._resamples(100, 500, 0)
    counts = np.concatenate(list(source))
    assert counts.shape == (500, 100)
    assert (counts.sum(1) == 100).all()
    means = counts @ np.sort(x) / 100
    assert tuple(np.quantile(means, [0.025, 0.975])) == pytest.approx(whole)


def test_pairs_by_id_and_says_how_many():
    a = {"x": 0.0, "y": 1.0, "only before": 0.0}
    b = {"y": 1.0, "x": 1.0, "only after": 0.0}
    found = paired_difference(a, b, n=50)
    assert (found.difference, found.n) == (0.5, 2)
    with pytest.raises(ValueError, match="no item in common"):
        paired_difference({"x": 1.0}, {"y": 1.0})


def test_parts_are_summed_before_they_are_divided():
    a = {"short": (10.0, 1.0), "long": (100.0, 100.0)}
    b = {"short": (5.0, 1.0), "long": (100.0, 100.0)}
    assert paired_difference(a, b, n=50).difference == pytest.approx((105 - 110) / 101)


def test_flips():
    before = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.0, "gone": 1.0}
    after = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.0, "new": 0.0}
    assert flips(before, after) == (["a"], ["b"])
    assert flips({"a": 0.4}, {"a": 0.5}) == (["a"], [])
    assert flips({"a": 0.5}, {"a": 0.5}) == ([], [])
    assert flips({"a": 0.4}, {"a": 0.5}, threshold=0.6) == ([], [])


@pytest.mark.parametrize(
    ("scores", "weights", "options"),
    [
        ([], None, {}),
        ([float("nan")], None, {}),
        ([1.0, float("inf")], None, {}),
        ([1.0, 2.0], [1.0], {}),
        ([1.0, 2.0], [0.0, 0.0], {}),
        ([1.0, 2.0], [1.0, -1.0], {}),
        ([1.0, 2.0], None, {"n": 0}),
        ([1.0, 1.0], None, {"level": 1.0}),
    ],
)
def test_bad_input_is_refused(scores, weights, options):
    with pytest.raises(ValueError, match=r"."):
        interval(scores, weights, **options)


def test_resamples_without_a_denominator_are_left_out():
    low, high = interval([1.0, 3.0], weights=[0.0, 2.0], n=200)
    assert (low, high) == (3.0, 3.0)
