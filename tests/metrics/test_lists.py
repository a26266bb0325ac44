"""NDCG, MRR, MAP and hit rate against scikit-learn, against every order of the ties, by hand, and over any split."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from ninerank.errors import DataError
from ninerank.metrics import MAP, MRR, NDCG, HitRate, average_precision, hit_rate, ndcg, reciprocal_rank

KINDS = {"ndcg": NDCG, "mrr": MRR, "map": MAP, "hit": HitRate}


def one_list(kind: str, gains: list[float], k: int) -> float:
    """The metric of labels in the order of the list."""
    if kind == "ndcg":
        discount = [1 / math.log2(r + 2) for r in range(len(gains))]
        best = sum(d * g for d, g in zip(discount[:k], sorted(gains, reverse=True), strict=False))
        return sum(d * g for d, g in zip(discount[:k], gains, strict=False)) / best
    hits = [r for r, gain in enumerate(gains[:k]) if gain > 0]
    if kind == "mrr":
        return 1 / (hits[0] + 1) if hits else 0.0
    if kind == "map":
        return sum((n + 1) / (r + 1) for n, r in enumerate(hits)) / min(sum(g > 0 for g in gains), k)
    return float(bool(hits))


def over_all_orders(kind: str, label: list[float], score: list[float], k: int) -> float:
    """Mean over every order of the rows that descends by score."""
    orders = [o for o in itertools.permutations(range(len(label))) if all(score[a] >= score[b] for a, b in itertools.pairwise(o))]
    return float(np.mean([one_list(kind, [label[n] for n in order], k) for order in orders]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=6), k=st.integers(1, 7), grade=st.booleans())
def test_ties_count_as_the_mean_over_their_orders(kind: str, rows: list[tuple[bool, int]], k: int, grade: bool) -> None:
    label = [float(y) * (1 + n * (grade and kind == "ndcg")) for n, (y, _) in enumerate(rows)]
    score = [s / 2 for _, s in rows]
    found = KINDS[kind](k).update(label, score, group_B=[5] * len(rows)).value()
    if not any(label):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(over_all_orders(kind, label, score, k), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [None, 1, 3, 10])
def test_ndcg_equals_scikit_learn(k: int | None, dtype: type) -> None:
    rng = np.random.default_rng(1)
    gain, score = rng.integers(0, 4, (40, 12)), (rng.integers(-6, 6, (40, 12)) / 4).astype(dtype)
    gain[:, 0] = 1
    group = np.repeat(rng.permutation(40), 12)
    assert ndcg(gain.ravel(), score.ravel(), group_N=group, k=k) == pytest.approx(ndcg_score(gain, score, k=k), abs=1e-12)


def test_map_without_ties_equals_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    label, score = rng.random((30, 9)) < 0.3, rng.normal(size=(30, 9))
    label[:, 3] = True
    expected = np.mean([average_precision_score(y, s) for y, s in zip(label, score, strict=True)])
    assert average_precision(label.ravel(), score.ravel(), group_N=np.repeat(np.arange(30), 9)) == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    # Group 1 in order: 0 1 0 1. Group 2: 1 0. Group 3 has no positive and counts for nothing.
    label, score, group = [1, 0, 0, 1, 1, 0, 0], [0.8, 0.9, 0.5, 0.1, 0.7, 0.6, 0.9], [1, 1, 1, 1, 2, 2, 3]
    assert reciprocal_rank(label, score, group_N=group) == pytest.approx((1 / 2 + 1) / 2)
    assert average_precision(label, score, group_N=group) == pytest.approx(((1 / 2 + 2 / 4) / 2 + 1) / 2)
    assert hit_rate(label, score, group_N=group, k=1) == 0.5
    assert hit_rate(label, score, group_N=group, k=2) == 1.0
    table = MRR().update(label, score, group_B=group).groups()
    assert (table.group_G.tolist(), table.value_G.tolist()) == ([1, 2], [0.5, 1.0])
    # A group's weight is the mean of its rows': (2 * 0.5 + 4 * 1) / 6.
    assert reciprocal_rank(label, score, [2, 2, 2, 2, 4, 4, 1], group_N=group) == pytest.approx(5 / 6)


def test_a_long_list_of_equal_scores() -> None:
    label = np.zeros(3000)
    label[:3] = 1
    # The first of 3 positives among n places lies at r with chance C(n - r, 2) / C(n, 3).
    expected = sum(math.comb(3000 - r, 2) / math.comb(3000, 3) / r for r in range(1, 2999))
    assert reciprocal_rank(label, np.zeros(3000), group_N=np.zeros(3000, int)) == pytest.approx(expected, rel=1e-9)
    assert hit_rate(label, np.zeros(3000), group_N=np.zeros(3000, int), k=1000) == pytest.approx(
        1 - math.comb(2000, 3) / math.comb(3000, 3), rel=1e-9
    )


ROW = st.tuples(st.booleans(), st.integers(-2, 2), st.sampled_from([0.0, 0.5, 2.0]), st.integers(-2, 2))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(ROW, max_size=30), cuts=st.lists(st.integers(0, 30), max_size=3), weighted=st.booleans(), k=st.sampled_from([None, 2]))
def test_merge_over_any_split_is_the_whole(
    kind: str, rows: list[tuple[bool, int, float, int]], cuts: list[int], weighted: bool, k: int | None
) -> None:
    label, score, weight, group = (
        (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.empty(0),) * 3 + (np.empty(0, int),)
    )
    make = KINDS[kind]
    bounds = sorted([0, len(rows), *(min(cut, len(rows)) for cut in cuts)])
    merged = make(k)
    for part in reversed([slice(*pair) for pair in itertools.pairwise(bounds)]):
        own = make(k).update(label[part], score[part], weight[part] if weighted else None, group[part])
        merged.merge(make.from_state(own.state()))
    whole = make(k).update(label, score, weight if weighted else None, group)
    assert merged.value() == pytest.approx(whole.value(), abs=1e-12, nan_ok=True)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        NDCG(0)
    with pytest.raises(ValueError, match="k=3 does not merge with k=5"):
        MAP(5).merge(MAP(3))
    with pytest.raises(DataError, match="MRR has no groups"):
        MRR().update([1], [0.5])
    with pytest.raises(DataError, match="label -1.0 in row 0: a finite number >= 0"):
        ndcg([-1], [0.5], group_N=[1])
    with pytest.raises(DataError, match="label 2 in row 0: 0 or 1"):
        reciprocal_rank([2], [0.5], group_N=[1])
    assert math.isnan(ndcg([], [], group_N=np.empty(0, int)))
