"""AUC, GAUC and the ROC curve against scikit-learn, hand-worked cases, and themselves over any split."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from ninerank.errors import DataError
from ninerank.metrics import AUC, GAUC, auc, gauc, roc_curve


def draw(seed: int, rows: int, levels: int | None, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores (with ties where `levels` is given, negative ones among them), weights and groups."""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=rows) if levels is None else rng.integers(-levels, levels, rows) / 7
    label = rng.random(rows) < 1 / (1 + np.exp(-score))
    return label.astype(np.float32), score.astype(dtype), rng.integers(0, 4, rows) * 0.5, rng.integers(-5, 30, rows)


def gauc_by_loop(label: np.ndarray, score: np.ndarray, weight: np.ndarray, group: np.ndarray) -> float:
    total = mass = 0.0
    for key in np.unique(group):
        own = (group == key) & (weight > 0)
        if len(np.unique(label[own])) == 2:
            total += weight[own].sum() * roc_auc_score(label[own], score[own], sample_weight=weight[own])
            mass += weight[own].sum()
    return total / mass if mass else math.nan


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 1, 20])
@pytest.mark.parametrize("rows", [2, 7, 5000])
def test_auc_equals_scikit_learn(rows: int, levels: int | None, dtype: type) -> None:
    label, score, weight, _ = draw(rows, rows, levels, dtype)
    label[:2], weight[:2] = (0, 1), 1
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert auc(label, score, weight) == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)
    assert auc(label, score, np.ones(rows)) == pytest.approx(auc(label, score), abs=1e-12)
    assert auc(1 - label, score) == pytest.approx(1 - auc(label, score), abs=1e-12)


def test_auc_by_hand() -> None:
    # Pairs (positive, negative): .35 > .1, .35 < .4, .8 > .1, .8 > .4 -> 3 of 4.
    assert auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert auc([1, 0], [0.3, 0.3]) == 0.5
    assert auc([1, 0], [-0.0, 0.0]) == 0.5
    # The tie counts half, the pair of weight 3 * 2 is won: (6 + 0.5 * 3 * 1) / (3 * 3).
    assert auc([1, 0, 0], [0.5, 0.1, 0.5], [3, 2, 1]) == pytest.approx(7.5 / 9)


def test_scores_closer_than_float32_are_not_tied() -> None:
    assert auc([1, 0], [0.5 + 1e-12, 0.5]) == 1.0
    assert gauc([1, 0], [0.5 + 1e-12, 0.5], group_N=[1, 1]) == 1.0


@pytest.mark.parametrize(("label", "weight"), [([], None), ([1, 1], None), ([0, 0], None), ([0, 1], [1, 0])])
def test_without_both_classes_there_is_no_auc(label: list[int], weight: list[int] | None) -> None:
    scores = np.linspace(0, 1, len(label))
    assert math.isnan(auc(label, scores, weight))
    assert math.isnan(gauc(label, scores, weight, group_N=np.zeros(len(label), int)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 3])
def test_gauc_equals_a_loop_over_groups(levels: int | None, dtype: type) -> None:
    label, score, weight, group = draw(3, 3000, levels, dtype)
    expected = gauc_by_loop(label, score, np.ones(3000), group)
    assert gauc(label, score, group_N=group) == pytest.approx(expected, abs=1e-12)
    hashed = group.astype(np.int64) * 0x1E3779B97F4A7C15 + 77
    assert gauc(label, score, group_N=hashed) == pytest.approx(expected, abs=1e-12)
    assert gauc(label, score, group_N=hashed.view(np.uint64)) == pytest.approx(expected, abs=1e-12)
    assert gauc(label, score, weight, group_N=group) == pytest.approx(gauc_by_loop(label, score, weight, group), abs=1e-12)
    assert gauc(label, score, weight, group_N=np.zeros(3000, np.int8)) == pytest.approx(auc(label, score, weight), abs=1e-12)


def test_gauc_by_hand() -> None:
    # Group 1: 3 rows, AUC 1/2. Group 2: 2 rows, AUC 1. Group 3 has positives alone. (3 * .5 + 2 * 1) / 5.
    label, score, group = [1, 0, 0, 1, 0, 1], [0.5, 0.4, 0.6, 0.2, 0.1, 0.9], [1, 1, 1, 2, 2, 3]
    assert gauc(label, score, group_N=group) == pytest.approx(0.7)
    table = GAUC().update(label, score, group_B=group).groups()
    assert table.group_G.tolist() == [1, 2]
    assert table.weight_G.tolist() == [3, 2]
    assert table.auc_G.tolist() == [0.5, 1.0]


def test_extreme_group_keys_come_back() -> None:
    low, high = -(1 << 63), (1 << 63) - 1
    table = GAUC().update([1, 0, 1, 0], [1, 0, 0, 1], group_B=[low, low, high, high]).groups()
    assert table.group_G.tolist() == [low, high]
    assert table.auc_G.tolist() == [1, 0]
    near = GAUC().update([1, 0, 1, 0], [1, 0, 0, 1], group_B=[low, low, low + 9, low + 9]).groups()
    assert near.group_G.tolist() == [low, low + 9]


ROW = st.tuples(st.booleans(), st.integers(-4, 4), st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-200]), st.integers(-2, 2))


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROW, max_size=40), cuts=st.lists(st.integers(0, 40), max_size=4), data=st.data())
def test_merge_over_any_split_is_the_whole(rows: list[tuple[bool, int, float, int]], cuts: list[int], data: st.DataObject) -> None:
    label, score, weight, group = (
        (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.empty(0),) * 3 + (np.empty(0, int),)
    )
    bounds = sorted([0, len(rows), *(min(cut, len(rows)) for cut in cuts)])
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    order = data.draw(st.permutations(parts))
    for weighted in (False, True):
        exact, within = AUC(), GAUC()
        for part in order:
            own = weight[part] if weighted else None
            exact.merge(AUC.from_state(AUC().update(label[part], score[part], own).state()))
            within.merge(GAUC.from_state(GAUC().update(label[part], score[part], own, group[part]).state()))
        whole = weight if weighted else None
        assert exact.num_rows == len(rows)
        assert exact.value() == pytest.approx(auc(label, score, whole), abs=1e-12, nan_ok=True)
        assert within.value() == pytest.approx(gauc(label, score, whole, group_N=group), abs=1e-12, nan_ok=True)
        if not weighted:
            np.testing.assert_array_equal(exact.value(), auc(label, score))


def test_weighted_and_plain_updates_mix() -> None:
    label, score, weight, group = draw(5, 200, 5)
    mixed = AUC().update(label[:90], score[:90]).update(label[90:], score[90:], weight[90:])
    filled = np.concatenate([np.ones(90), weight[90:]])
    assert mixed.value() == pytest.approx(auc(label, score, filled), abs=1e-12)
    within = GAUC().update(label[:90], score[:90], None, group[:90]).merge(GAUC().update(label[90:], score[90:], weight[90:], group[90:]))
    assert within.value() == pytest.approx(gauc(label, score, filled, group_N=group), abs=1e-12)


def test_accumulators_keep_no_hold_on_the_callers_arrays() -> None:
    label, score, group = np.array([True, False]), np.array([0.7, 0.2]), np.array([1, 1])
    metric = GAUC().update(label, score, np.array([1.0, 1.0]), group)
    label[:], score[:], group[:] = False, 0, [1, 2]
    assert metric.value() == 1.0


def test_merge_leaves_the_other_as_it_was() -> None:
    first, second = AUC().update([0, 1], [0.1, 0.9]), AUC().update([1, 0], [0.1, 0.9])
    first.merge(second)
    assert second.value() == 0.0
    second.update([1], [1.0])
    assert first.num_rows == 4


def test_tiny_weights_count_by_their_ratio() -> None:
    label, score, weight, group = draw(6, 300, 5)
    assert auc(label, score, weight * 1e-250) == pytest.approx(auc(label, score, weight), abs=1e-12)
    assert gauc(label, score, weight * 1e-250, group_N=group) == pytest.approx(gauc(label, score, weight, group_N=group), abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_roc_curve_equals_scikit_learn(weighted: bool) -> None:
    label, score, weight, _ = draw(11, 400, 12)
    weight = weight if weighted else None
    expected = sklearn_roc_curve(label, score, sample_weight=weight, drop_intermediate=False)
    found = roc_curve(label, score, weight)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_thinned_roc_curve_keeps_its_ends_and_its_area() -> None:
    label, score, _, _ = draw(12, 50_000, None)
    curve = AUC().update(label, score).curve(max_points=200)
    assert 150 < len(curve.threshold_K) <= 200
    assert [curve[0][0], curve[1][0], curve[0][-1], curve[1][-1]] == [0, 0, 1, 1]
    assert np.trapezoid(curve.true_positive_rate_K, curve.false_positive_rate_K) == pytest.approx(auc(label, score), abs=1e-4)


def test_roc_curve_of_one_class_has_no_rate_for_the_other() -> None:
    curve = roc_curve(np.ones(1000), np.arange(1000.0), max_points=10)
    assert np.isnan(curve.false_positive_rate_K).all()
    assert curve.true_positive_rate_K[-1] == 1
    assert len(curve.threshold_K) <= 10


@pytest.mark.parametrize(
    ("label", "score", "weight", "message"),
    [
        ([0, 1], [0.1], None, "2 labels for 1 scores"),
        ([0, 0.5], [0.1, 0.2], None, r"label 0.5 in row 1: 0 or 1"),
        ([0, math.nan], [0.1, 0.2], None, "label nan in row 1"),
        ([0, 1, 1], [0.1, math.nan, math.inf], None, r"score nan in row 1 \(and 1 more\): finite"),
        ([[0, 1]], [[0.1, 0.2]], None, r"labels have shape \(1, 2\)"),
        ([0, 1], ["a", "b"], None, "scores are <U1"),
        ([0, 1], [0.1, 0.2], [1], "1 weights for 2 rows"),
        ([0, 1], [0.1, 0.2], [1, -1], "weight -1.0 in row 1"),
    ],
)
def test_bad_rows_are_refused(label: list[float], score: list[float], weight: list[float] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        AUC().update(label, score, weight)


@pytest.mark.parametrize(
    ("group", "message"),
    [(None, "group_B is needed"), ([1], r"shape \(1,\): \(2,\)"), ([0.5, 1], "float64: integers"), (["a", "b"], "integers are needed")],
)
def test_bad_groups_are_refused(group: list[object] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        GAUC().update([0, 1], [0.1, 0.2], None, group)


def test_unlike_accumulators_do_not_merge() -> None:
    with pytest.raises(TypeError, match="AUC merges with its own kind, not with GAUC"):
        AUC().merge(GAUC())  # type: ignore[arg-type]
