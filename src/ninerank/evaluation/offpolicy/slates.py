"""Lists: what another ranking policy would have earned, under one of five beliefs about how rewards hang together.

A list of K places has too many alternatives for plain IPS, whose weights are products over all places. Each estimator here
gains by a belief, and is unbiased where it holds: rewards at place k depend on

    item_position       the item at k alone; weight by the chances that item stands at k at all   (Li et al. 2018)
    independent         the item at k alone, places drawn one by one; weight by the chance at k given those above
    cascade             the items at 1..k, users reading from the top; weights multiply down to k  (Kiyohara et al. 2022)
    reward_interaction  as cascade, self-normalised at each place, over a look-back of some places  (McInerney et al. 2020)
    pseudo_inverse      the list's reward is a sum of unknown shares of its (item, place) pairs     (Swaminathan et al. 2017)
    standard            the whole list; weights multiply over all places

Shape legend: L lists, K places, I items, M possible lists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.evaluation.offpolicy.feedback import WHAT_TO_LOG
from ninerank.metrics.accumulator import ratio
from ninerank.metrics.clusters import ClusterSums
from ninerank.metrics.intervals import Interval
from ninerank.metrics.rows import Array, check_groups

MOST_PLACES = 10_000

__all__ = ["SLATE_ESTIMATORS", "Slates", "pseudo_inverse_weights", "slate_value"]


@dataclass(frozen=True)
class Slates:
    """Logged lists, float64 (L, K) each; shorter lists are filled up with nan in all three.

    reward_LK: what came of each place. propensity_LK: chance, under the logging policy, of the item at k given those above
    it; for item_position and pseudo_inverse the chance that the item stands at k at all. target_LK: the same under the target policy.
    cluster_L: int64 keys of users whose lists depend on one another, or None.
    """

    reward_LK: Array
    propensity_LK: Array
    target_LK: Array
    cluster_L: Array | None = None

    @classmethod
    def of(cls, reward_LK: ArrayLike, propensity_LK: ArrayLike | None, target_LK: ArrayLike, *, cluster_L: ArrayLike | None = None) -> Self:
        """Check arrays and join them; raises DataError for missing or impossible probabilities, and says what to log."""
        reward = np.asarray(reward_LK, np.float64)
        if reward.ndim != 2:
            raise DataError(f"rewards of lists have shape {reward.shape}: (lists, places) is needed")
        if propensity_LK is None:
            raise DataError(f"the log has no propensities, without which no policy but its own can be valued: {WHAT_TO_LOG}")
        propensity, target = np.asarray(propensity_LK, np.float64), np.asarray(target_LK, np.float64)
        if not reward.shape == propensity.shape == target.shape:
            raise DataError(f"rewards {reward.shape}, propensities {propensity.shape}, targets {target.shape}: one shape is needed")
        missing = np.isnan(reward)
        if not ((np.isnan(propensity) == missing).all() and (np.isnan(target) == missing).all()):
            raise DataError("places that a list does not have must be nan in rewards, propensities and targets alike")
        wrong = ~missing & ~((propensity > 0) & (propensity <= 1))
        if wrong.any():
            row, place = np.argwhere(wrong)[0].tolist()
            value = float(propensity[row, place])
            raise DataError(f"propensity {value!r} in list {row}, place {place}: above 0 and at most 1 is needed; {WHAT_TO_LOG}")
        wrong = ~missing & ~((target >= 0) & (target <= 1))
        if wrong.any():
            row, place = np.argwhere(wrong)[0].tolist()
            raise DataError(f"target probability {float(target[row, place])!r} in list {row}, place {place}: a number in [0, 1] is needed")
        return cls(reward, propensity, target, None if cluster_L is None else check_groups(cluster_L, len(reward), what="clusters"))

    @classmethod
    def of_rows(
        cls,
        list_N: ArrayLike,
        place_N: ArrayLike,
        reward_N: ArrayLike,
        propensity_N: ArrayLike | None,
        target_N: ArrayLike,
        *,
        cluster_N: ArrayLike | None = None,
    ) -> Self:
        """From one row a place: list_N integer keys, place_N places from 0 on. Raises DataError if a place comes twice."""
        place = np.asarray(place_N)
        if propensity_N is None:
            raise DataError(f"the log has no propensities, without which no policy but its own can be valued: {WHAT_TO_LOG}")
        _, first, row_N = np.unique(check_groups(list_N, len(place), what="lists"), return_index=True, return_inverse=True)
        if len(place) and (place.dtype.kind not in "iu" or place.min() < 0):
            raise DataError(f"places are {place.dtype}, the smallest {place.min()}: integers from 0 on are needed")
        shape = (len(first), int(place.max(initial=-1)) + 1)
        if shape[1] > MOST_PLACES:
            raise DataError(f"place {shape[1] - 1}: at most {MOST_PLACES} places of a list are taken")
        taken = np.bincount(row_N * max(shape[1], 1) + place, minlength=1)
        if len(place) and taken.max() > 1:
            raise DataError("a place of a list occurs twice: one row for each place of each list is needed")
        tables = []
        for column in (reward_N, propensity_N, target_N):
            table = np.full(shape, np.nan)
            table[row_N, place] = column
            tables.append(table)
        return cls.of(*tables, cluster_L=None if cluster_N is None else np.asarray(cluster_N)[first])

    @property
    def weight_LK(self) -> Array:
        """Importance weight of each place; 1 at places that are not there, nan nowhere."""
        weight: Array = np.where(np.isnan(self.reward_LK), 1.0, self.target_LK / self.propensity_LK)
        return weight


def _per_place(weight_LK: Array, rows: Slates) -> Array:
    return np.stack([(weight_LK * np.nan_to_num(rows.reward_LK)).sum(1), np.ones(len(rows.reward_LK))])


def _item_position(rows: Slates) -> Array:
    """V = 1/L sum_l sum_k r_lk w_lk, w of the chances that the item stands at k."""
    return _per_place(rows.weight_LK, rows)


def _cascade(rows: Slates) -> Array:
    """V = 1/L sum_l sum_k r_lk prod_{j <= k} w_lj."""
    return _per_place(np.cumprod(rows.weight_LK, axis=1), rows)


def _standard(rows: Slates) -> Array:
    """V = 1/L sum_l (prod_k w_lk) sum_k r_lk."""
    return _per_place(rows.weight_LK.prod(1, keepdims=True), rows)


def _pseudo_inverse(rows: Slates) -> Array:
    """V = 1/L sum_l (sum_k r_lk) (sum_k w_lk - K + 1): the pseudo-inverse where the logging policy draws places independently."""
    there = ~np.isnan(rows.reward_LK)
    weight_L = 1 + np.where(there, rows.weight_LK - 1, 0.0).sum(1)
    return _per_place(weight_L[:, None], rows)


def _interaction(lookback: int | None, rows: Slates) -> Array:
    """Sums for V = sum_k [sum_l r_lk W_lk / sum_l W_lk] * (share of lists with a place k), W_lk = prod_{k - lookback < j <= k} w_lj."""
    weight_LK, (lists, places) = rows.weight_LK, rows.reward_LK.shape
    window = places if lookback is None else lookback
    joint_LK = np.stack([weight_LK[:, max(0, k + 1 - window) : k + 1].prod(1) for k in range(places)], axis=1)
    there = ~np.isnan(rows.reward_LK)
    joint_LK = joint_LK * there
    return np.concatenate([(joint_LK * np.nan_to_num(rows.reward_LK)).T, joint_LK.T, there.T, np.ones((1, lists))])


def _mean(sums_SR: Array) -> Array:
    return ratio(sums_SR[0], sums_SR[1])


def _interaction_of(sums_SR: Array) -> Array:
    won, weight, there = np.split(sums_SR[:-1], 3)
    value_R: Array = (np.where(there > 0, ratio(won, weight), 0.0) * there).sum(0) / sums_SR[-1]
    return value_R


Terms = Callable[[Slates], Array]
SLATE_ESTIMATORS: dict[str, Terms] = {
    "item_position": _item_position,
    "independent": _item_position,
    "cascade": _cascade,
    "reward_interaction": partial(_interaction, None),
    "pseudo_inverse": _pseudo_inverse,
    "standard": _standard,
}


def slate_value(rows: Slates, estimator: str, *, lookback: int | None = None, level: float = 0.95) -> Interval:
    """Expected reward of a list under the target policy, by one of `SLATE_ESTIMATORS`, clustered by `cluster_L`.

    lookback: of reward_interaction, the number of places, the own one among them, whose weights multiply; all if None.
    Raises ValueError for an estimator that is not there.
    """
    if estimator not in SLATE_ESTIMATORS:
        raise ValueError(f"no slate estimator {estimator!r}; there are {', '.join(SLATE_ESTIMATORS)}")
    if lookback is not None and (estimator != "reward_interaction" or lookback < 1):
        raise ValueError(f"lookback {lookback} with {estimator}: 1 or more, and only with reward_interaction")
    interaction = estimator == "reward_interaction"
    terms = _interaction(lookback, rows) if interaction else SLATE_ESTIMATORS[estimator](rows)
    sums = ClusterSums(len(terms))
    sums.add(terms, rows.cluster_L)
    return sums.interval(_interaction_of if interaction else _mean, level)


def pseudo_inverse_weights(logged_LK: ArrayLike, possible_MK: ArrayLike, chance_M: ArrayLike, target_KI: ArrayLike) -> Array:
    """Weights of lists under any logging policy whose lists can be listed: w(s) = q^T pinv(G) 1_s (Swaminathan et al. 2017, eq. 3).

    1_s in {0, 1}^{K I} marks the (place, item) pairs of list s, G = E_{pi_0}[1_s 1_s^T], q = E_pi[1_s]. The estimate is the
    mean of (sum_k r_k) w. Draws without repetition, for which places are not independent, are covered.
    logged_LK, possible_MK: int items. chance_M: logging policy's chance of each possible list. target_KI: the target's chance of each
    item at each place. float64 (L,). Raises DataError if chances do not sum to 1, or a pair of the target cannot be logged.
    """
    logged, possible, chance = np.asarray(logged_LK), np.asarray(possible_MK), np.asarray(chance_M, np.float64)
    target = np.asarray(target_KI, np.float64)
    if possible.ndim != 2 or logged.ndim != 2 or target.ndim != 2 or not logged.shape[1] == possible.shape[1] == len(target):
        raise DataError(f"lists {logged.shape}, possible lists {possible.shape}, target {target.shape}: (L, K), (M, K), (K, I) are needed")
    if abs(chance.sum() - 1) > 1e-6 or (chance < 0).any():
        raise DataError(f"chances of the possible lists sum to {chance.sum():.6g}: 1 is needed")
    marks = _marks(possible, target.shape[1])
    gram = marks.T @ (chance[:, None] * marks)
    missed = (target.ravel() > 0) & (np.diag(gram) <= 0)
    if missed.any():
        place, item = divmod(int(missed.argmax()), target.shape[1])
        raise DataError(f"the target puts item {item} at place {place}, where the logging policy never does: nothing is known of it")
    weight: Array = _marks(logged, target.shape[1]) @ (np.linalg.pinv(gram, hermitian=True) @ target.ravel())
    return weight


def _marks(list_MK: Array, num_items: int) -> Array:
    """float64 (M, K * I): 1 for each (place, item) of a list."""
    marks = np.zeros((len(list_MK), list_MK.shape[1], num_items))
    np.put_along_axis(marks, list_MK[:, :, None], 1.0, axis=2)
    return marks.reshape(len(list_MK), -1)
