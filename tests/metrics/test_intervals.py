"""Confidence intervals: against the definitions, over any split, and how often they cover the truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from ninerank.errors import DataError
from ninerank.metrics import (
    GAUC,
    PCOC,
    AUCDifference,
    AUCInterval,
    Bootstrap,
    Interval,
    LogLoss,
    MetricDifference,
    MetricInterval,
    NormalizedEntropy,
    RatioInterval,
    RelativeInformationGain,
    auc,
    auc_bootstrap,
    auc_difference,
    auc_interval,
    bootstrap,
    logloss,
    metric_difference,
    metric_interval,
    normal_interval,
    poisson_weights,
    ratio_interval,
)
from ninerank.metrics.intervals import student_quantile
from ninerank.metrics.keys import distinct


def draw(seed: int, users: int, rows_each: int = 6) -> tuple[np.ndarray, ...]:
    """Labels, two models' scores, weights and users; a user's taste makes the rows of one user alike."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows_each)
    taste = rng.normal(size=users)[user]
    logit = taste + rng.normal(size=len(user))
    label = rng.random(len(user)) < 1 / (1 + np.exp(1 - logit))
    first, second = (1 / (1 + np.exp(1 - logit - noise * rng.normal(size=len(user)))) for noise in (0.5, 1.0))
    return label, first, second, rng.integers(1, 4, len(user)).astype(float), user * 7919 - 5


def delong(label: np.ndarray, scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each score and their covariance, pair by pair as DeLong et al. define it."""
    positive, negative = ([score[keep] for score in scores] for keep in (label, ~label))
    wins = np.stack([(p[:, None] > n) + 0.5 * (p[:, None] == n) for p, n in zip(positive, negative, strict=True)])
    return wins.mean((1, 2)), np.cov(wins.mean(2)) / label.sum() + np.cov(wins.mean(1)) / (~label).sum()


@pytest.mark.parametrize("digits", [1, 12])
def test_delong_equals_its_definition(digits: int) -> None:
    label, first, second, _, _ = draw(1, 60)
    first, second = first.round(digits), second.round(digits)
    areas, covariance = delong(label, [first, second])
    one = auc_interval(label, first)
    assert one.value == pytest.approx(areas[0], abs=1e-12)
    assert one.standard_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)
    both = auc_difference(label, first, second)
    assert both.value == pytest.approx(areas[0] - areas[1], abs=1e-12)
    assert both.standard_error == pytest.approx(math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]), rel=1e-9)
    assert (both.high - both.low) / both.standard_error == pytest.approx(2 * 1.959964, rel=1e-6)
    assert auc_difference(label, first, first)[:4] == (0, 0, 0, 0)


def test_weights_count_as_repeated_rows_in_clusters() -> None:
    label, first, second, weight, user = draw(2, 50)
    times = weight.astype(int)
    repeated = [np.repeat(column, times) for column in (label, first, second, user)]
    found = auc_difference(label, first, second, weight, cluster_N=user)
    expected = auc_difference(*repeated[:3], cluster_N=repeated[3])
    assert found[:4] == pytest.approx(expected[:4], rel=1e-9)
    assert auc_interval(label, first, weight, cluster_N=user).value == pytest.approx(auc(label, first, weight))
    each = np.arange(len(label))
    assert auc_interval(label, first, cluster_N=each).standard_error == pytest.approx(auc_interval(label, first).standard_error, rel=0.01)


ROW = st.tuples(st.booleans(), st.integers(0, 8), st.integers(0, 8), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 4))
MAKERS = {
    "auc": lambda: AUCInterval(0.9, clustered=True),
    "auc difference": lambda: AUCDifference(0.9, clustered=True),
    "log loss": lambda: MetricInterval(LogLoss, 0.9),
    "entropy difference": lambda: MetricDifference(NormalizedEntropy, 0.9),
    "ratio": lambda: RatioInterval(0.9),
    "bootstrap": lambda: Bootstrap(PCOC, 50, seed=3, level=0.9),
    "paired bootstrap": lambda: Bootstrap(LogLoss, 50, level=0.9),
}


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=30, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=30), cut=st.integers(0, 30))
def test_merge_over_any_split_is_the_whole(kind: str, rows: list[tuple[bool, int, int, float, int]], cut: int) -> None:
    label, first, second, weight, cluster = (np.array(column) for column in zip(*rows, strict=True))
    first, second = first / 8, second / 8

    def fed(own: slice) -> AUCInterval:
        metric = MAKERS[kind]()
        scores = (first[own], second[own]) if "difference" in kind else (first[own],)
        if kind == "ratio":
            return metric.update(first[own], weight[own], cluster[own])
        if "bootstrap" in kind:
            other = second[own] if kind.startswith("paired") else None
            return metric.update(label[own], first[own], weight[own], cluster_B=cluster[own], other_B=other)
        return metric.update(label[own], *scores, weight[own], cluster[own])

    whole, parts = fed(slice(None)), [fed(slice(cut, None)), fed(slice(0, cut))]
    merged = type(whole).from_state(parts[0].state()).merge(type(whole).from_state(parts[1].state()))
    assert merged.value() == pytest.approx(whole.value(), rel=1e-6, abs=1e-9, nan_ok=True)
    assert merged.value().level == 0.9


def test_delta_method_equals_its_formulas() -> None:
    label, first, second, weight, user = draw(3, 80)
    clicks, mass = np.bincount(user - user.min(), label * weight), np.bincount(user - user.min(), weight)
    clicks, mass = clicks[mass > 0], mass[mass > 0]
    rate = clicks.sum() / mass.sum()
    expected = math.sqrt(80 / 79 * ((clicks - rate * mass) ** 2).sum()) / mass.sum()
    assert ratio_interval(label * weight, weight, cluster_N=user).standard_error == pytest.approx(expected, rel=1e-8)
    # A mean of independent rows has the textbook's error, whether each row is its own cluster or none is named.
    plain = ratio_interval(first)
    assert plain.standard_error == pytest.approx(first.std(ddof=1) / math.sqrt(len(first)), rel=1e-8)
    assert ratio_interval(first, cluster_N=np.arange(len(first)))[:4] == pytest.approx(plain[:4], rel=1e-8)
    # Differences of means of the same rows have the error of the mean difference.
    loss = [-np.log(np.where(label, score, 1 - score)) for score in (first, second)]
    found = metric_difference(LogLoss, label, first, second)
    assert found.value == pytest.approx(logloss(label, first) - logloss(label, second))
    assert found.standard_error == pytest.approx((loss[0] - loss[1]).std(ddof=1) / math.sqrt(len(label)), rel=1e-6)
    ne = metric_interval(NormalizedEntropy, label, first, weight, cluster_N=user)
    rig = metric_interval(RelativeInformationGain, label, first, weight, cluster_N=user)
    assert (rig.value, rig.standard_error) == pytest.approx((1 - ne.value, ne.standard_error))


def test_bootstrap_and_delta_method_agree() -> None:
    label, first, second, weight, user = draw(4, 1500, 4)
    for metric in (LogLoss, NormalizedEntropy, PCOC):
        by_delta = metric_difference(metric, label, first, second, weight, cluster_N=user)
        resampled = Bootstrap(metric, 1000, seed=1).update(label, first, weight, cluster_B=user, other_B=second).value()
        assert resampled.value == pytest.approx(by_delta.value)
        assert resampled.standard_error == pytest.approx(by_delta.standard_error, rel=0.1)
        assert (resampled.low, resampled.high) == pytest.approx((by_delta.low, by_delta.high), abs=0.4 * by_delta.standard_error)
    by_rank = auc_difference(label, first, second, weight, cluster_N=user)
    resampled = auc_bootstrap(label, first, weight, cluster_N=user, other_N=second, num_replicates=300)
    assert resampled.value == pytest.approx(by_rank.value)
    assert resampled.standard_error == pytest.approx(by_rank.standard_error, rel=0.15)
    table = GAUC().update(label, first, None, user).groups()
    within = ratio_interval(table.weight_G * table.auc_G, table.weight_G, cluster_N=table.group_G)
    assert within.value == pytest.approx(GAUC().update(label, first, None, user).value())
    sums = np.stack([table.weight_G * table.auc_G, table.weight_G])
    again = bootstrap(lambda sums_SR: sums_SR[0] / sums_SR[1], sums, cluster_N=table.group_G)
    assert again.standard_error == pytest.approx(within.standard_error, rel=0.1)


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5), max_size=30))
def test_distinct_keys_are_those_of_numpy(keys: list[int]) -> None:
    column = np.array(keys, np.int64)
    for mine, theirs in zip(distinct(column), np.unique(column, return_inverse=True), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_poisson_weights_are_those_of_the_key() -> None:
    key = np.arange(-500, 20_000)
    weight = poisson_weights(key, 41, seed=5)
    shuffled = np.random.default_rng(1).permutation(len(key))
    np.testing.assert_array_equal(poisson_weights(key[shuffled], 41, seed=5), weight[shuffled])
    np.testing.assert_array_equal(poisson_weights(key, 7, seed=5), weight[:, :7])
    assert weight.mean() == pytest.approx(1, abs=0.005)
    assert weight.var() == pytest.approx(1, abs=0.01)
    assert np.abs(np.corrcoef(weight.T) - np.eye(41)).max() < 0.04
    assert abs(np.corrcoef(weight[:-1, 0], weight[1:, 0])[0, 1]) < 0.03
    assert not np.array_equal(poisson_weights(key, 41, seed=6), weight)


COVERAGE_RUNS = 300


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    label, first, second, _, _ = draw(5, 100_000)
    truth = {
        "auc": auc(label, first),
        "auc difference": auc(label, first) - auc(label, second),
        "log loss difference": logloss(label, first) - logloss(label, second),
        "rate": label.mean(),
    }
    hits = dict.fromkeys([*truth, "rate as if rows were independent", "bootstrap"], 0)
    for run in range(COVERAGE_RUNS):
        label, first, second, _, user = draw(1000 + run, 150)
        found = {
            "auc": auc_interval(label, first, cluster_N=user),
            "auc difference": auc_difference(label, first, second, cluster_N=user),
            "log loss difference": metric_difference(LogLoss, label, first, second, cluster_N=user),
            "rate": ratio_interval(label, cluster_N=user),
        }
        for name, interval in found.items():
            hits[name] += interval.covers(truth[name])
        hits["rate as if rows were independent"] += ratio_interval(label).covers(truth["rate"])
        drawn = Bootstrap(LogLoss, 200, seed=run).update(label, first, cluster_B=user, other_B=second).value()
        hits["bootstrap"] += drawn.covers(truth["log loss difference"])
    share = {name: count / COVERAGE_RUNS for name, count in hits.items()}
    naive = share.pop("rate as if rows were independent")
    assert all(0.91 <= own <= 0.985 for own in share.values()), share
    assert naive < 0.9, "rows of one user are alike: an interval that ignores it is too narrow"


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_students_quantile_is_that_of_scipy(level: float) -> None:
    for degrees, error in ((1, 1e-9), (2, 1e-9), (3, 0.02), (5, 0.01), (10, 1e-3), (30, 1e-4), (1000, 1e-8)):
        assert student_quantile(level, degrees) == pytest.approx(t.ppf(0.5 + level / 2, degrees), rel=error)


def test_few_clusters_are_covered_too() -> None:
    rng = np.random.default_rng(6)
    found = [ratio_interval(rng.normal(size=24), cluster_N=np.repeat(np.arange(8), 3)) for _ in range(400)]
    assert 0.92 <= np.mean([interval.covers(0) for interval in found]) <= 0.98
    normal = [abs(interval.value) < 1.96 * interval.standard_error for interval in found]
    assert np.mean(normal) < np.mean([interval.covers(0) for interval in found])


def test_what_has_no_interval() -> None:
    assert all(math.isnan(x) for x in auc_interval([1, 1], [0.5, 0.6])[:4])
    single = auc_interval([1, 0, 0], [0.5, 0.4, 0.6])
    assert single.value == 0.5
    assert math.isnan(single.standard_error)
    assert math.isnan(ratio_interval([1.0]).low)
    assert math.isnan(ratio_interval([1.0, 2.0], cluster_N=[3, 3]).low)
    assert math.isnan(ratio_interval(np.empty(0)).value)
    assert math.isnan(metric_interval(PCOC, [0, 0], [0.5, 0.5]).value)
    assert math.isnan(auc_bootstrap([1, 1], [0.1, 0.2], cluster_N=[1, 2]).low)
    assert math.isnan(Interval(math.nan, 0, 0, math.nan).p_value)
    assert normal_interval(1.959964, 1.0).p_value == pytest.approx(0.05, abs=1e-6)
    assert (normal_interval(0, 0).p_value, normal_interval(1, 0).p_value) == (1.0, 0.0)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence level 95"):
        auc_interval([0, 1], [0, 1], level=95)
    with pytest.raises(DataError, match="cluster_B is missing"):
        AUCInterval(clustered=True).update([0, 1], [0, 1])
    with pytest.raises(DataError, match="made without clusters"):
        AUCInterval().update([0, 1], [0, 1], None, [1, 2])
    with pytest.raises(DataError, match="clusters are float64"):
        ratio_interval([1.0, 2.0], cluster_N=[0.5, 1.0])
    with pytest.raises(DataError, match="score nan in row 1"):
        auc_difference([0, 1], [0, 1], [0, math.nan])
    with pytest.raises(DataError, match="finite numbers"):
        ratio_interval([1.0, math.inf])
    with pytest.raises(ValueError, match="PCOC does not merge with one of LogLoss"):
        MetricInterval(LogLoss).merge(MetricInterval(PCOC))
    with pytest.raises(ValueError, match="rows with clusters do not merge"):
        AUCInterval().merge(AUCInterval(clustered=True))
    with pytest.raises(ValueError, match=r"\('LogLoss', 60, 0\) does not merge"):
        Bootstrap(LogLoss, 50).merge(Bootstrap(LogLoss, 60))
    paired = Bootstrap(LogLoss, 50).update([1], [0.5], cluster_B=[1], other_B=[0.2])
    with pytest.raises(ValueError, match="some rows have scores of two models"):
        Bootstrap(LogLoss, 50).update([1], [0.5], cluster_B=[1]).merge(paired)
    with pytest.raises(ValueError, match="some rows have scores of two models"):
        Bootstrap.from_state(paired.state()).update([1], [0.5], cluster_B=[1])
    with pytest.raises(ValueError, match="at least 2"):
        Bootstrap(LogLoss, 1)
    with pytest.raises(ValueError, match="no metric made of sums is called 'Nothing'"):
        MetricInterval.from_state({**MetricInterval(LogLoss).state(), "metric": np.array("Nothing")})
