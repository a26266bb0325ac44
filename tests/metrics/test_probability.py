"""Log loss, normalised entropy, PCOC, calibration and the score histogram against scikit-learn, by hand, and over any split."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss

from ninerank.errors import DataError
from ninerank.metrics import (
    CLIP,
    PCOC,
    Calibration,
    LogLoss,
    NormalizedEntropy,
    RelativeInformationGain,
    ScoreHistogram,
    calibration,
    ece,
    logloss,
    normalized_entropy,
    pcoc,
)


def draw(seed: int, rows: int, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    score = rng.beta(0.7, 9, rows).astype(dtype)
    return (rng.random(rows) < score * 1.2).astype(np.int64), score, rng.random(rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logloss_equals_scikit_learn(dtype: type) -> None:
    label, score, weight = draw(1, 5000, dtype)
    clipped = np.clip(score.astype(np.float64), CLIP, 1 - CLIP)
    assert logloss(label, score) == pytest.approx(log_loss(label, clipped), rel=1e-12)
    assert logloss(label, score, weight) == pytest.approx(log_loss(label, clipped, sample_weight=weight), rel=1e-12)


def test_saturated_scores_cost_the_stated_clip() -> None:
    assert logloss([1, 0], [0.0, 1.0]) == pytest.approx(-math.log(CLIP))
    assert logloss([0, 1], [0.0, 1.0]) == pytest.approx(CLIP, rel=1e-6)
    assert logloss(np.array([0]), np.array([1.0], np.float32)) == pytest.approx(-math.log(CLIP))


def test_normalized_entropy_by_hand() -> None:
    label, score, weight = draw(2, 4000)
    rate = np.average(label, weights=weight)
    background = log_loss(label, np.full(4000, rate), sample_weight=weight)
    assert normalized_entropy(label, score, weight) == pytest.approx(logloss(label, score, weight) / background, rel=1e-12)
    assert normalized_entropy([0, 1, 0, 0], [0.25] * 4) == pytest.approx(1.0)


def test_pcoc_by_hand() -> None:
    label, score, weight = draw(3, 4000)
    assert pcoc(label, score, weight) == pytest.approx((score * weight).sum() / (label * weight).sum(), rel=1e-12)
    assert pcoc([0, 1], [0.5, 0.5]) == 1.0


def test_what_has_no_value_is_nan() -> None:
    assert math.isnan(logloss([], []))
    assert math.isnan(pcoc([0, 0], [0.1, 0.2]))
    assert math.isnan(normalized_entropy([1, 1], [0.1, 0.2]))
    assert math.isnan(normalized_entropy([], []))
    assert math.isnan(ece([], []))
    assert len(calibration([], []).weight_K) == 0
    assert len(ScoreHistogram().between([0, 1]).weight_K) == 0


def test_buckets_of_equal_width_equal_scikit_learn() -> None:
    label, score, _ = draw(4, 5000)
    rate, mean = calibration_curve(label, score, n_bins=12, strategy="uniform")
    found = calibration(label, score, num_buckets=12, by="width")
    np.testing.assert_allclose(found.rate_K, rate, rtol=1e-12)
    np.testing.assert_allclose(found.score_K, mean, rtol=1e-6)
    assert found.weight_K.sum() == 5000
    assert (found.low_K <= found.score_K).all()
    assert (found.score_K <= found.high_K).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_buckets_of_equal_mass_hold_what_lies_between_their_bounds(dtype: type) -> None:
    label, score, weight = draw(5, 20_000, dtype)
    found = calibration(label, score, weight, num_buckets=10)
    assert len(found.weight_K) == 10
    np.testing.assert_allclose(found.weight_K, weight.sum() / 10, rtol=0.05)
    assert found.low_K[0] == 0
    assert found.high_K[-1] == 1
    np.testing.assert_array_equal(found.low_K[1:], found.high_K[:-1])
    for low, high, mass, positive, mean, rate in zip(*found, strict=True):
        own = (score >= low) & ((score < high) | (high == 1))
        assert mass == pytest.approx(weight[own].sum())
        assert positive == pytest.approx((weight * label)[own].sum())
        assert mean == pytest.approx(np.average(score[own], weights=weight[own]))
        assert rate == pytest.approx(np.average(label[own], weights=weight[own]))


def test_equal_scores_are_one_bucket() -> None:
    found = calibration([0, 1, 1, 0], [0.5] * 4, num_buckets=20)
    assert found.weight_K.tolist() == [4]
    assert found.ece == 0


def test_ece_by_hand() -> None:
    # [0, .5): mean score .2, rate 0. [.5, 1]: mean score .8, rate .5. (2 * .2 + 2 * .3) / 4.
    assert ece([0, 0, 1, 0], [0.1, 0.3, 1.0, 0.6], num_buckets=2, by="width") == pytest.approx(0.25)
    assert ece([0, 0, 1, 0], [0.1, 0.3, 1.0, 0.6], num_buckets=2) == pytest.approx(0.25)


def test_histogram_between_edges_counts_each_row_once() -> None:
    label, score, _ = draw(6, 10_000)
    histogram = ScoreHistogram().update(label, score)
    edges = np.linspace(0, 1, 51)
    found = histogram.between(edges)
    counted, _ = np.histogram(score, edges)
    assert found.weight_K.sum() == 10_000
    assert found.positive_K.sum() == label.sum()
    np.testing.assert_allclose(found.weight_K, counted[counted > 0], atol=10_000 * 0.01)
    ends = ScoreHistogram().update([0, 1, 1], [0.0, 1.0, 1.0]).between([0, 0.5, 1])
    assert ends.weight_K.tolist() == [1, 2]


MAKERS = {
    "logloss": LogLoss,
    "ne": NormalizedEntropy,
    "rig": RelativeInformationGain,
    "pcoc": PCOC,
    "mass": partial(Calibration, 4),
    "width": partial(Calibration, 4, "width"),
    "histogram": ScoreHistogram,
}


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.floats(0, 10)), max_size=30), cut=st.integers(0, 30), weighted=st.booleans()
)
def test_merge_over_any_split_is_the_whole(name: str, rows: list[tuple[bool, float, float]], cut: int, weighted: bool) -> None:
    label, score, weight = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.empty(0),) * 3
    make = MAKERS[name]
    metric_type = type(make())
    first = make().update(label[:cut], score[:cut], weight[:cut] if weighted else None)
    second = make().update(label[cut:], score[cut:], weight[cut:] if weighted else None)
    whole = make().update(label, score, weight if weighted else None)
    merged = metric_type.from_state(first.state()).merge(metric_type.from_state(second.state()))
    for key, value in whole.state().items():
        np.testing.assert_allclose(merged.state()[key], value, rtol=1e-10, atol=1e-10)
    if name in {"logloss", "ne", "rig", "pcoc"} and (not weighted or (weight.sum() > 1e-3)):
        assert merged.value() == pytest.approx(whole.value(), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("label", "score", "message"),
    [
        ([0, 1], [0.5, 1.5], r"score 1.5 in row 1: a probability in \[0, 1\] is needed"),
        ([0, 1], [-0.5, 0.5], r"score -0.5 in row 0"),
        ([0, 1], [math.nan, 0.5], "score nan in row 0: finite"),
        ([0, 2], [0.1, 0.5], "label 2 in row 1"),
    ],
)
def test_bad_rows_are_refused(make: partial, label: list[int], score: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make().update(label, score)


def test_calibrations_of_unlike_buckets_do_not_merge() -> None:
    with pytest.raises(ValueError, match="5 buckets by mass do not merge with 4 by mass"):
        Calibration(4).merge(Calibration(5))
    with pytest.raises(ValueError, match="at least 1"):
        Calibration(0)
    with pytest.raises(ValueError, match="'mass' or 'width'"):
        Calibration(4, "quantile")  # type: ignore[arg-type]
