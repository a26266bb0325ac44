"""Bucketed AUC: within its stated bound of the exact one, whatever the scores; exact where bins tell all pairs apart."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.metrics import BucketedAUC, auc, bucketed_auc

SCORES = st.floats(-1e30, 1e30) | st.floats(0, 1) | st.sampled_from([0.0, -0.0, 0.5, 0.5000001, 0.501, 1e-40, -1e-40])


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.booleans(), SCORES, st.sampled_from([0.0, 0.5, 3.0])), max_size=30),
    cut=st.integers(0, 30),
    weighted=st.booleans(),
    single=st.booleans(),
)
def test_exact_auc_lies_within_the_bound_over_any_split(
    rows: list[tuple[bool, float, float]], cut: int, weighted: bool, single: bool
) -> None:
    label, score, weight = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.empty(0),) * 3
    score = score.astype(np.float32) if single else score
    first = BucketedAUC().update(label[:cut], score[:cut], weight[:cut] if weighted else None)
    second = BucketedAUC().update(label[cut:], score[cut:], weight[cut:] if weighted else None)
    merged = BucketedAUC.from_state(second.state()).merge(BucketedAUC.from_state(first.state())).value()
    whole = bucketed_auc(label, score, weight if weighted else None)
    exact = auc(label, score, weight if weighted else None)
    assert merged == pytest.approx(whole, abs=1e-12, nan_ok=True)
    assert math.isnan(whole.auc) == math.isnan(exact)
    if not math.isnan(exact):
        assert abs(whole.auc - exact) <= whole.bound + 1e-12


def test_bound_is_reached_and_small_for_click_rates() -> None:
    near = np.array([0.5, 0.5 + 1e-6], np.float32)
    assert bucketed_auc([0, 1], near) == (0.5, 0.5)
    assert auc([0, 1], near) == 1.0
    rng = np.random.default_rng(1)
    score = rng.beta(1, 15, 400_000).astype(np.float32)
    label = rng.random(400_000) < score
    found = bucketed_auc(label, score)
    assert 0 < found.bound < 1e-3
    assert abs(found.auc - auc(label, score)) < 1e-5
    assert abs(bucketed_auc(label, np.log(score / (1 - score))).auc - auc(label, score)) < 1e-4


def test_scores_of_both_signs_keep_their_order() -> None:
    score = np.array([-3e38, -2.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 2.0, 3e38])
    for cut in range(1, 9):
        assert bucketed_auc(np.arange(9) >= cut, score) == pytest.approx((1.0, 0.0))
    assert bucketed_auc([0, 1], [-1e300, 1e300]).auc == 1.0


def test_many_chunks_and_a_bad_row_far_down() -> None:
    rng = np.random.default_rng(2)
    score = rng.random(600_000).astype(np.float32)
    label = rng.random(600_000) < score
    metric = BucketedAUC().update(label, score)
    assert abs(metric.value().auc - auc(label, score)) <= metric.value().bound
    before = metric.state()["sum"]
    score[500_000] = np.nan
    with pytest.raises(DataError, match="score nan in row 500000"):
        metric.update(label, score)
    np.testing.assert_array_equal(metric.state()["sum"], before)
    with pytest.raises(DataError, match="2 labels for 1 scores"):
        metric.update([0, 1], [0.5])
    with pytest.raises(DataError, match="1 weights for 2 rows"):
        metric.update([0, 1], [0.5, 0.2], [1])
