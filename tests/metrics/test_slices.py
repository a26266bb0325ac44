"""Sliced metrics, several tasks, conversion over its spaces, catalogue figures and down-sampling: by hand and over any split."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from ninerank.errors import DataError
from ninerank.metrics import (
    AUC,
    GAUC,
    PCOC,
    Conversion,
    ItemCounts,
    LogLoss,
    PerTask,
    RelativeInformationGain,
    Sliced,
    auc,
    calibration,
    coverage,
    logloss,
    normalized_entropy,
    novelty,
    pcoc,
    relative_information_gain,
    restore_scores,
    sampling_weights,
    time_slices,
    top_k,
)


def test_relative_information_gain_is_what_entropy_leaves() -> None:
    label, score = [0, 1, 0, 1], [0.2, 0.7, 0.3, 0.6]
    assert relative_information_gain(label, score) == pytest.approx(1 - normalized_entropy(label, score))
    assert RelativeInformationGain().update([0, 1], [0.5, 0.5]).value() == pytest.approx(0)
    assert math.isnan(relative_information_gain([0], [0.5]))


def test_pcoc_of_each_bucket() -> None:
    found = calibration([0, 1, 1, 0], [0.25, 0.25, 0.75, 0.9], num_buckets=2, by="width")
    assert found.pcoc_K.tolist() == pytest.approx([0.5, 1.65])
    assert math.isnan(calibration([0], [0.25], num_buckets=1).pcoc_K[0])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 5), st.integers(0, 2)), max_size=30), cut=st.integers(0, 30)
)
def test_each_slice_is_the_metric_of_its_rows(rows: list[tuple[int, bool, int, int]], cut: int) -> None:
    key, label, score, group = (np.array(c) for c in zip(*rows, strict=True)) if rows else (np.empty(0, int),) * 4
    first, second = Sliced(AUC), Sliced(AUC)
    first.update(key[:cut], label[:cut], score[:cut]).merge(second.update(key[cut:], label[cut:], score[cut:]))
    assert first.value() == pytest.approx({k: auc(label[key == k], score[key == k]) for k in np.unique(key).tolist()}, nan_ok=True)
    assert Sliced.from_state(first.state(), AUC).value() == pytest.approx(first.value(), nan_ok=True)
    within = Sliced(GAUC).update(key, label, score, None, group)
    for k, metric in within.metrics.items():
        own = key == k
        assert metric.value() == pytest.approx(GAUC().update(label[own], score[own], None, group[own]).value(), nan_ok=True)


def test_slices_by_time_and_their_limits() -> None:
    assert time_slices(np.array([-1, 0, 86_399, 86_400]), 86_400).tolist() == [-86_400, 0, 0, 86_400]
    with pytest.raises(DataError, match="width 0"):
        time_slices([1], 0)
    with pytest.raises(DataError, match="slice 2 would be number 3: at most 2"):
        Sliced(PCOC, max_slices=2).update([0, 1, 2], [1, 1, 1], [0.5, 0.5, 0.5])
    with pytest.raises(DataError, match="a slice of nan"):
        Sliced(PCOC).update([0.0, math.nan], [1, 1], [0.5, 0.5])
    with pytest.raises(DataError, match="a column of 1 rows is sliced by one of 2"):
        Sliced(PCOC).update([0, 1], [1], [0.5])


def test_tasks_are_measured_where_they_have_labels() -> None:
    label = np.array([[0, np.nan], [1, 0], [1, 1], [0, np.nan]])
    score = np.array([[0.1, 0.5], [0.9, 0.2], [0.5, 0.3], [0.6, 0.1]])
    weight = np.array([1.0, 2.0, 3.0, 4.0])
    found = PerTask(LogLoss, ["click", "buy"]).update(label[:2], score[:2], weight[:2])
    rest = PerTask(LogLoss, ["click", "buy"]).update(label[2:], score[2:], weight[2:])
    found.merge(PerTask.from_state(rest.state(), LogLoss))
    assert found.value()["click"] == pytest.approx(log_loss(label[:, 0], score[:, 0], sample_weight=weight))
    assert found.value()["buy"] == pytest.approx(logloss([0, 1], [0.2, 0.3], [2, 3]))
    assert PerTask(GAUC, ["a"]).update([[1], [0]], [[0.9], [0.1]], group_B=[1, 1]).value() == {"a": 1.0}
    with pytest.raises(DataError, match="of tasks click, buy"):
        found.update(label[:, :1], score[:, :1])
    with pytest.raises(ValueError, match="tasks other do not merge with click, buy"):
        found.merge(PerTask(LogLoss, ["other"]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 60), weighted=st.booleans())
def test_conversion_is_measured_over_its_spaces(seed: int, cut: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    ctr, cvr, weight = rng.random(60), rng.random(60), rng.random(60) + 0.1
    click = rng.random(60) < ctr
    buy = click & (rng.random(60) < cvr)
    click[0], buy[0], click[1], buy[1], click[2] = True, True, True, False, False
    buy[2] = False
    parts = [
        Conversion().update(click[s], buy[s], ctr[s], cvr[s], weight[s] if weighted else None) for s in (slice(cut, None), slice(0, cut))
    ]
    found = Conversion.from_state(parts[0].state()).merge(Conversion.from_state(parts[1].state())).value()
    own = weight if weighted else np.ones(60)
    assert (found.click.rows, found.conversion.rows, found.both.rows) == (60, click.sum(), 60)
    assert found.click.auc == pytest.approx(roc_auc_score(click, ctr, sample_weight=own))
    assert found.conversion.auc == pytest.approx(roc_auc_score(buy[click], cvr[click], sample_weight=own[click]))
    assert found.both.auc == pytest.approx(roc_auc_score(buy, ctr * cvr, sample_weight=own))
    assert found.both.logloss == pytest.approx(log_loss(buy, ctr * cvr, sample_weight=own), rel=1e-6)
    assert found.conversion.pcoc == pytest.approx(pcoc(buy[click], cvr[click], own[click]))


def test_conversion_without_a_click_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1 has a conversion and no click \(1 such rows\)"):
        Conversion().update([1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5])
    with pytest.raises(DataError, match="1 conversions for 2 clicks"):
        Conversion().update([1, 0], [0], [0.5, 0.5], [0.5])


@settings(max_examples=60, deadline=None)
@given(items=st.lists(st.integers(-3, 6), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_catalogue_figures_over_any_split(items: list[int], cut: int) -> None:
    parts = [ItemCounts().update(np.array(own, int)) for own in (items[:cut], items[cut:])]
    merged = ItemCounts.from_state(parts[0].state()).merge(parts[1])
    assert merged.value() == {item: items.count(item) for item in sorted(set(items))}
    assert merged.coverage(20) == len(set(items)) / 20
    counts = sorted([0] * (20 - len(set(items))) + list(merged.value().values()))
    pairs = sum(abs(a - b) for a in counts for b in counts) / (2 * 20 * sum(counts))
    assert merged.gini(20) == pytest.approx(pairs)
    expected = np.mean([-math.log2(items.count(item) / len(items)) for item in items])
    assert novelty(items, items) == pytest.approx(expected)


def test_catalogue_by_hand() -> None:
    assert coverage([3, 3, 5], 4) == 0.5
    assert novelty([9], [1, 1, 1, 1]) == 2.0
    assert math.isnan(novelty(np.empty(0, int), [1]))
    assert math.isnan(ItemCounts().gini(3))
    with pytest.raises(DataError, match="a catalogue of 1 items, and 2 different"):
        coverage([3, 5], 1)
    with pytest.raises(DataError, match="items are float64"):
        ItemCounts().update([0.5])
    assert top_k(np.array([0.5, 0.5, 0.9, 0.1, -1.0]), [1, 1, 1, 2, 2], 2).tolist() == [True, False, True, True, True]


def test_down_sampled_negatives_are_corrected() -> None:
    rng = np.random.default_rng(3)
    score = rng.beta(1, 12, 200_000)
    label = rng.random(200_000) < score
    kept = label | (rng.random(200_000) < 0.2)
    # A model fitted to the kept rows would say p / (p + r (1 - p)); the correction undoes that.
    sampled = score / (score + 0.2 * (1 - score))
    np.testing.assert_allclose(restore_scores(sampled, 0.2), score, rtol=1e-12)
    weight = sampling_weights(label[kept], 0.2)
    assert pcoc(label[kept], restore_scores(sampled[kept], 0.2), weight) == pytest.approx(pcoc(label, score), abs=0.01)
    assert logloss(label[kept], score[kept], weight) == pytest.approx(logloss(label, score), rel=0.01)
    assert auc(label[kept], sampled[kept]) == pytest.approx(auc(label[kept], score[kept]), abs=1e-9)
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(DataError, match="share of negatives"):
            restore_scores([0.5], wrong)
    with pytest.raises(DataError, match="score 1.5"):
        restore_scores([1.5], 0.5)
