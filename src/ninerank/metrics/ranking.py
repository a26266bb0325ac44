"""How well scores order the rows: exact AUC, AUC within groups (GAUC), and the ROC curve.

Shape legend: B rows of one update, N rows in all, G groups, K points of a curve.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ninerank.errors import DataError
from ninerank.metrics.accumulator import RowAccumulator
from ninerank.metrics.keys import HALF, group_codes, score_codes
from ninerank.metrics.rows import Array, Rows, check_groups, check_rows

__all__ = ["AUC", "GAUC", "GroupTable", "RocCurve", "auc", "gauc", "roc_curve"]

LOW_HALF = np.uint64(0xFFFFFFFF)


class RocCurve(NamedTuple):
    """Points of a ROC curve, from (0, 0) to (1, 1): float64 (K,) each; rows with score >= threshold count as positive."""

    false_positive_rate_K: Array
    true_positive_rate_K: Array
    threshold_K: Array


class GroupTable(NamedTuple):
    """AUC of each group that has both classes: int64 (G,) keys, float64 (G,) weight of its rows, float64 (G,) AUC."""

    group_G: Array
    weight_G: Array
    auc_G: Array


class AUC(RowAccumulator):
    """Exact area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    The Mann-Whitney statistic (Hanley & McNeil 1982), pairs weighted by the product of their weights. Unweighted
    counts are integers, so neither the order of the rows nor the way they were split changes a bit of the result.
    nan where there are no positives or no negatives. Raises DataError for rows that `check_rows` refuses.

    >>> AUC().update([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).value()
    0.75
    """

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None) -> "AUC":
        self._append(label_B, score_B, weight_B)
        return self

    def value(self) -> float:
        return _auc(self._rows())

    def curve(self, max_points: int = 512) -> RocCurve:
        """The ROC curve, thinned to about `max_points` evenly along its length."""
        return _roc(self._rows(), max_points)


class GAUC(RowAccumulator):
    """AUC within groups (users, queries, requests), averaged by the groups' impressions.

    GAUC = sum_g w_g AUC_g / sum_g w_g over the groups with both classes, w_g the number of the group's rows, or the
    sum of their weights (Zhu et al. 2017, "Optimized Cost per Click in Taobao Display Advertising"; Zhou et al. 2018,
    "Deep Interest Network"). Groups of one class have no AUC and are left out. nan where no group has both.

    >>> GAUC().update([1, 0, 0, 1, 1], [0.9, 0.1, 0.2, 0.3, 0.1], group_B=[7, 7, 8, 8, 9]).value()
    1.0
    """

    grouped = True

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None, group_B: ArrayLike | None = None) -> "GAUC":
        if group_B is None:
            raise DataError("GAUC has no groups: group_B is needed, one integer key per row")
        self._append(label_B, score_B, weight_B, group_B)
        return self

    def value(self) -> float:
        return _mean_auc(self.groups())

    def groups(self) -> GroupTable:
        """AUC and weight of each group with both classes, by ascending key."""
        return _group_table(self._rows(), self._column("group"))


def auc(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """`AUC` of all rows at once.

    >>> auc([0, 1, 1], [0.5, 0.5, 0.5])
    0.5
    """
    return _auc(check_rows(label_N, score_N, weight_N))


def gauc(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, group_N: ArrayLike) -> float:
    """`GAUC` of all rows at once."""
    rows = check_rows(label_N, score_N, weight_N)
    return _mean_auc(_group_table(rows, check_groups(group_N, len(rows))))


def roc_curve(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, max_points: int = 512) -> RocCurve:
    """ROC curve of all rows at once, thinned to about `max_points`; rates are nan for a class that is missing."""
    return _roc(check_rows(label_N, score_N, weight_N), max_points)


def _auc(rows: Rows) -> float:
    if rows.weight_B is not None:
        return _mean_auc(_group_table(rows, np.zeros(len(rows), np.int64)))
    positive, negative = rows.score_B[rows.label_B], rows.score_B[~rows.label_B]
    pairs = len(positive) * len(negative)
    if pairs == 0:
        return float("nan")
    # The rarer class is looked up in the sorted other one: two plain sorts and few binary searches, no permutation.
    swapped = len(positive) > len(negative)
    few, many = (np.sort(negative), np.sort(positive)) if swapped else (np.sort(positive), np.sort(negative))
    won_twice = int(np.searchsorted(many, few, "left").sum()) + int(np.searchsorted(many, few, "right").sum())
    return (2 * pairs - won_twice if swapped else won_twice) / (2 * pairs)


def _mean_auc(table: GroupTable) -> float:
    total = table.weight_G.sum()
    return float((table.weight_G * table.auc_G).sum() / total) if total > 0 else float("nan")


def _group_table(rows: Rows, group_N: Array) -> GroupTable:
    """Sort (group, score) keys of each class, then look each positive up among the negatives of its group.

    P positives: won_P is twice the weight of the negatives below, plus that of the equal ones.
    """
    code_N, keys = group_codes(group_N)
    key_N = (code_N << HALF) | score_codes(rows.score_B)
    positive_P, weight_P, positive_mass = _sorted_class(key_N, rows.weight_B, rows.label_B)
    negative, _, negative_mass = _sorted_class(key_N, rows.weight_B, ~rows.label_B)
    if not len(positive_P):
        return GroupTable(np.empty(0, np.int64), np.empty(0), np.empty(0))
    code_P = positive_P >> HALF
    start_G = np.flatnonzero(np.concatenate([[True], code_P[1:] != code_P[:-1]]))
    end_G, code_G = np.append(start_G[1:], len(positive_P)), code_P[start_G]
    first_G = np.searchsorted(negative, code_G << HALF, "left")
    last_G = np.searchsorted(negative, (code_G << HALF) | LOW_HALF, "right")
    won_P = negative_mass[np.searchsorted(negative, positive_P, "left")] + negative_mass[np.searchsorted(negative, positive_P, "right")]
    positive_G, negative_G = positive_mass[end_G] - positive_mass[start_G], negative_mass[last_G] - negative_mass[first_G]
    # Each positive's share of the negatives first, so that products of tiny weights cannot vanish.
    with np.errstate(divide="ignore", invalid="ignore"):
        lost_P, whole_P = np.repeat(2 * negative_mass[first_G], end_G - start_G), np.repeat(2 * negative_G, end_G - start_G)
        share_P = (won_P - lost_P) / whole_P
        auc_G = np.add.reduceat(share_P if weight_P is None else share_P * weight_P, start_G) / positive_G
    both_G = (positive_G > 0) & (negative_G > 0)
    weight_G = (positive_G + negative_G)[both_G].astype(np.float64)
    return GroupTable(keys(code_G[both_G]), weight_G, np.clip(auc_G[both_G], 0.0, 1.0))


def _sorted_class(key_N: Array, weight_N: Array | None, chosen_N: Array) -> tuple[Array, Array | None, Array]:
    """Sorted keys of one class, their weights, and the weight of the first 0, 1, 2, ... of them."""
    key = key_N[chosen_N]
    if weight_N is None:
        return np.sort(key), None, np.arange(len(key) + 1)
    order = np.argsort(key)
    weight = weight_N[chosen_N][order]
    return key[order], weight, np.concatenate([[0.0], np.cumsum(weight)])


def _roc(rows: Rows, max_points: int) -> RocCurve:
    order = np.argsort(rows.score_B)[::-1]
    score_N, label_N = rows.score_B[order], rows.label_B[order]
    weight_N = np.ones(len(rows)) if rows.weight_B is None else rows.weight_B[order]
    last_N = np.flatnonzero(np.concatenate([score_N[1:] != score_N[:-1], [True]])) if len(rows) else np.empty(0, np.int64)
    positive_K = np.concatenate([[0.0], np.cumsum(weight_N * label_N)[last_N]])
    negative_K = np.concatenate([[0.0], np.cumsum(weight_N * ~label_N)[last_N]])
    with np.errstate(invalid="ignore"):
        curve = RocCurve(negative_K / negative_K[-1], positive_K / positive_K[-1], np.concatenate([[np.inf], score_N[last_N]]))
    if len(curve.threshold_K) <= max_points:
        return curve
    # Both rates rise along the curve, so their sum measures the way; a missing class (nan) counts for nothing.
    along_K = np.nan_to_num(curve.false_positive_rate_K) + np.nan_to_num(curve.true_positive_rate_K)
    kept = np.unique(np.searchsorted(along_K, np.linspace(0, along_K[-1], max_points)))
    return RocCurve(*(column[kept] for column in curve))
