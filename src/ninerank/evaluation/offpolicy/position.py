"""Position bias: how likely a place is looked at, from random traffic, from swaps, or from clicks alone by regression EM.

Examination is told relative to place 0: theta_k = P(looked at | place k) / P(looked at | place 0). A click needs a look and a
relevant item, P(click) = theta_k gamma(x) (position-based model, Richardson et al. 2007).

Shape legend: N rows, K places, D features.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ninerank.errors import DataError
from ninerank.metrics.clusters import ClusterSums
from ninerank.metrics.intervals import Interval
from ninerank.metrics.rows import Array, check_groups, check_rows

__all__ = ["Examination", "bias_from_random_traffic", "bias_from_swaps", "regression_em"]

SMALLEST = 1e-6
MOST_PLACES = 10_000


def bias_from_random_traffic(
    click_N: ArrayLike, place_N: ArrayLike, *, cluster_N: ArrayLike | None = None, level: float = 0.95
) -> list[Interval]:
    """theta_k = CTR at k / CTR at 0, where items were placed at random, so that places do not differ by what stands there.

    Joachims, Swaminathan & Schnabel 2017, "Unbiased Learning-to-Rank with Biased Feedback", section 5.3. Intervals by the delta
    method, clustered. Raises DataError for places that are no integers from 0 on, or a place 0 that was never clicked.
    """
    click, place, num_places = _checked(click_N, place_N)
    at = place[None, :] == np.arange(num_places)[:, None]
    sums = ClusterSums(2 * num_places)
    sums.add(np.concatenate([at & click, at]).astype(np.float64), cluster_N)
    if not sums.totals()[0] > 0:
        raise DataError("place 0 has no clicks: examination is told relative to it")
    return [sums.interval(partial(_relative, k, num_places), level) for k in range(num_places)]


def bias_from_swaps(
    click_N: ArrayLike, place_N: ArrayLike, swapped_N: ArrayLike, *, cluster_N: ArrayLike | None = None, level: float = 0.95
) -> dict[int, Interval]:
    """theta_k from requests in which places 0 and k traded items with chance 1/2: CTR at k / CTR at 0 over these requests alone.

    Over both halves the same items stood at either place, so their relevance cancels (Joachims et al. 2017). swapped_N: the place k whose
    experiment the row belongs to, whether it traded or not; rows at 0 and k count, others do not; -1 for rows outside all of them.
    """
    click, place, num_places = _checked(click_N, place_N)
    swapped = np.asarray(swapped_N)
    if swapped.shape != place.shape:
        raise DataError(f"swapped has shape {swapped.shape}: {place.shape} is needed, one place per row, -1 for none")
    clusters = None if cluster_N is None else check_groups(cluster_N, len(place), what="clusters")
    found = {}
    for k in np.unique(swapped[swapped > 0]).tolist():
        own = (swapped == k) & ((place == 0) | (place == k))
        pair = np.where(place[own] == k, 1, 0)
        rates = bias_from_random_traffic(click[own], pair, cluster_N=None if clusters is None else clusters[own], level=level)
        if len(rates) < 2:
            raise DataError(f"the swaps with place {k} have no row at place {k}; the log has places up to {num_places - 1}")
        found[k] = rates[1]
    return found


class Examination(NamedTuple):
    """theta_K: float64 (K,), relative to place 0. relevance_N: gamma of each row. iterations: until they changed no more."""

    theta_K: Array
    relevance_N: Array
    iterations: int


class _ByItem:
    """Relevance of each item by itself."""

    def __init__(self, item_N: ArrayLike, num_rows: int) -> None:
        distinct, self._item_N = np.unique(check_groups(item_N, num_rows, what="items"), return_inverse=True)
        if len(distinct) == num_rows:
            raise DataError("each item occurs once: relevance and place cannot be told apart; give features_ND")
        self._rows_I = np.bincount(self._item_N)

    def fit(self, share_N: Array) -> Array:
        mean_N: Array = (np.bincount(self._item_N, share_N) / self._rows_I)[self._item_N]
        return mean_N


class _Logistic:
    """Relevance by logistic regression with a ridge, fitted to shares in [0, 1] by Newton's method, each time from where it stands."""

    def __init__(self, x_ND: Array, ridge: float) -> None:
        self._x_ND, self._ridge, self._weight_D = x_ND, ridge, np.zeros(x_ND.shape[1])

    @classmethod
    def of(cls, features_ND: ArrayLike, num_rows: int, ridge: float) -> "_Logistic":
        x_ND = np.asarray(features_ND, np.float64)
        if x_ND.ndim != 2 or len(x_ND) != num_rows or not np.isfinite(x_ND).all():
            raise DataError(f"features have shape {x_ND.shape}: finite numbers ({num_rows}, D) are needed")
        return cls(np.concatenate([x_ND, np.ones((num_rows, 1))], axis=1), ridge)

    def fit(self, share_N: Array, steps: int = 3) -> Array:
        for _ in range(steps):
            chance_N = self._chance()
            slope = self._x_ND.T @ (share_N - chance_N) - self._ridge * self._weight_D
            curve = (self._x_ND * (chance_N * (1 - chance_N))[:, None]).T @ self._x_ND + self._ridge * np.eye(len(slope))
            self._weight_D = self._weight_D + np.linalg.solve(curve, slope)
        return self._chance()

    def _chance(self) -> Array:
        chance_N: Array = 1 / (1 + np.exp(-np.clip(self._x_ND @ self._weight_D, -30, 30)))
        return chance_N


def regression_em(
    click_N: ArrayLike,
    place_N: ArrayLike,
    *,
    features_ND: ArrayLike | None = None,
    item_N: ArrayLike | None = None,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
    ridge: float = 1.0,
) -> Examination:
    """Position bias from ordinary clicks, by expectation maximisation (Wang et al. 2018).

    Wang, Golbandi, Bendersky, Metzler & Najork 2018, "Position Bias Estimation for Unbiased Learning to Rank in Personal Search".
    E: with a click, looked at and relevant are certain; without one, P(looked) = theta (1 - gamma) / (1 - theta gamma) and
    P(relevant) = gamma (1 - theta) / (1 - theta gamma). M: theta_k is the mean of P(looked) at k; gamma is fitted to P(relevant),
    by logistic regression on `features_ND`, or for each of `item_N` by itself. Items (or like features) must occur at several
    places, or relevance and place cannot be told apart.
    Raises DataError for rows that do not fit each other, or for neither or both of features and items.
    """
    click, place, num_places = _checked(click_N, place_N)
    if features_ND is not None and item_N is None:
        relevance: _Logistic | _ByItem = _Logistic.of(features_ND, len(place), ridge)
    elif item_N is not None and features_ND is None:
        relevance = _ByItem(item_N, len(place))
    else:
        raise DataError("regression EM needs features_ND or item_N: what relevance is told by, one of the two")
    rows_K = np.maximum(np.bincount(place, minlength=num_places), 1)
    theta_K = np.linspace(0.9, 0.5, num_places)
    gamma_N = np.full(len(place), np.clip(2 * click.mean(), SMALLEST, 0.5))
    iteration, moved = 0, np.inf
    while iteration < max_iterations and moved >= tolerance:
        iteration += 1
        theta_N = theta_K[place]
        neither_N = np.maximum(1 - theta_N * gamma_N, SMALLEST)
        looked_N = np.where(click, 1.0, theta_N * (1 - gamma_N) / neither_N)
        relevant_N = np.where(click, 1.0, gamma_N * (1 - theta_N) / neither_N)
        before, theta_K = theta_K, np.clip(np.bincount(place, looked_N, num_places) / rows_K, SMALLEST, 1 - SMALLEST)
        gamma_N = np.clip(relevance.fit(relevant_N), SMALLEST, 1 - SMALLEST)
        moved = float(np.abs(theta_K / theta_K[0] - before / before[0]).max())
    return Examination(theta_K / theta_K[0], gamma_N * theta_K[0], iteration)


def _checked(click_N: ArrayLike, place_N: ArrayLike) -> tuple[Array, Array, int]:
    place = np.asarray(place_N)
    click = check_rows(click_N, np.zeros(place.shape)).label_B
    if not len(place) or place.dtype.kind not in "iu" or place.min() < 0:
        raise DataError(f"places are {place.dtype} {place.shape}: one integer from 0 on is needed per row")
    if place.max() >= MOST_PLACES:
        raise DataError(f"place {int(place.max())}: at most {MOST_PLACES} places are taken")
    return click, place, int(place.max()) + 1


def _relative(k: int, num_places: int, sums_SR: Array) -> Array:
    """theta_k of clicks at each place, then rows at each place."""
    with np.errstate(divide="ignore", invalid="ignore"):
        relative: Array = (sums_SR[k] / sums_SR[num_places + k]) / (sums_SR[0] / sums_SR[num_places])
    return relative
