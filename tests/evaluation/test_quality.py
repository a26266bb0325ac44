"""All metrics of a set of rows at once, over any split of it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.evaluation.quality import Quality
from ninerank.metrics import auc, ece, gauc, logloss, normalized_entropy, pcoc


def draw(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows)
    score = rng.beta(1, 5, rows).astype(np.float32)
    return rng.random(rows) < score, score, rng.random(rows), rng.integers(0, 9, rows)


def test_summary_is_what_the_functions_say() -> None:
    label, score, weight, group = draw(700)
    found = Quality().update(label, score, weight, group).summary()
    assert found.rows == 700
    assert found.weight == pytest.approx(weight.sum())
    assert found.positive_rate == pytest.approx(np.average(label, weights=weight))
    assert found.mean_score == pytest.approx(np.average(score, weights=weight))
    expected = {
        "auc": auc(label, score, weight),
        "gauc": gauc(label, score, weight, group_N=group),
        "logloss": logloss(label, score, weight),
        "ne": normalized_entropy(label, score, weight),
        "pcoc": pcoc(label, score, weight),
        "ece": ece(label, score, weight),
    }
    assert {key: value for key, value in found.as_dict().items() if key in expected} == pytest.approx(expected)


@given(st.lists(st.integers(0, 120), max_size=4))
def test_merge_over_any_split_is_the_whole(cuts: list[int]) -> None:
    label, score, weight, group = draw(120)
    bounds = [0, *sorted(cuts), 120]
    merged = Quality()
    for start, end in itertools.pairwise(bounds):
        own = slice(start, end)
        merged.merge(Quality().update(label[own], score[own], weight[own], group[own]))
    assert merged.summary().as_dict() == pytest.approx(Quality().update(label, score, weight, group).summary().as_dict())


def test_nothing_has_no_values() -> None:
    found = Quality().summary().as_dict()
    assert found == {
        "rows": 0,
        "weight": 0.0,
        **dict.fromkeys(("positive_rate", "mean_score", "auc", "gauc", "logloss", "ne", "pcoc", "ece")),
    }


def test_logits_are_refused() -> None:
    with pytest.raises(DataError, match=r"score -2.0 in row 0: a probability in \[0, 1\] is needed \(is this a logit\?\)"):
        Quality().update([0], [-2.0])
