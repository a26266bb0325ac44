"""Whether a log can answer at all: effective sample size, largest weight, overlap, support, and warnings in words.

Shape legend: N decisions.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from typing_extensions import Self

from ninerank.evaluation.offpolicy.feedback import Feedback
from ninerank.metrics.accumulator import Accumulator, State, under
from ninerank.metrics.delta import RatioInterval
from ninerank.metrics.intervals import Interval
from ninerank.metrics.rows import Array

__all__ = ["Diagnostics", "Overlap"]

FEWEST_EFFECTIVE = 100
FEWEST_REWARDED = 100
SMALLEST_SHARE = 0.01
LARGEST_SHARE = 0.05
TINY_PROPENSITY = 1e-4


class Diagnostics(NamedTuple):
    """How much of a log speaks about the target policy.

    decisions, clusters: how many. rewarded: decisions with a reward that the target takes too. effective_size: (sum w)^2 / sum w^2
    (Kish 1965). effective_share: of the decisions. largest_weight, largest_weight_share: the largest, and its share of all weight.
    mean_weight: 1 where propensities are right and every action of the target can occur. unmatched_share: decisions that the target never
    takes. smallest_propensity. target_without_support: probability mass of the target on actions that the log cannot contain; nan where it
    is not known. warnings: what of this speaks against the estimates, in words.
    """

    decisions: int
    clusters: int
    rewarded: int
    effective_size: float
    effective_share: float
    largest_weight: float
    largest_weight_share: float
    mean_weight: Interval
    unmatched_share: float
    smallest_propensity: float
    target_without_support: float
    warnings: tuple[str, ...]


class Overlap(Accumulator):
    """Sums and extremes of the importance weights, merged over shards. Unsupported mass is told by `note_support`."""

    def __init__(self) -> None:
        self._mean = RatioInterval()
        # Sum of squares, decisions with weight 0, those with weight and reward; unsupported mass of the target, decisions it is known for.
        self._sums = np.zeros(5)
        self._largest, self._smallest = 0.0, np.inf

    def update(self, rows: Feedback) -> Self:
        if len(rows):
            weight_N = rows.weight_N
            self._mean.update(weight_N, None, rows.cluster_N)
            self._sums[:3] += [weight_N @ weight_N, (weight_N == 0).sum(), ((weight_N > 0) & (rows.reward_N != 0)).sum()]
            self._largest = max(self._largest, float(weight_N.max()))
            self._smallest = min(self._smallest, float(rows.propensity_N.min()))
        return self

    def note_support(self, unsupported_N: Array) -> Self:
        """unsupported_N: for each decision, the target's probability of actions that the logging policy never takes there."""
        self._sums[3:] += [float(np.sum(unsupported_N)), len(unsupported_N)]
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._mean.merge(other._mean)
        self._sums = self._sums + other._sums
        self._largest, self._smallest = max(self._largest, other._largest), min(self._smallest, other._smallest)
        return self

    def value(self) -> Diagnostics:
        total, decisions = self._mean.totals().tolist()
        squares, unmatched, rewarded, unsupported, known = self._sums.tolist()
        effective = total**2 / squares if squares > 0 else 0.0
        found = Diagnostics(
            decisions=int(decisions),
            clusters=self._mean.num_clusters,
            rewarded=int(rewarded),
            effective_size=effective,
            effective_share=effective / decisions if decisions else 0.0,
            largest_weight=self._largest,
            largest_weight_share=self._largest / total if total > 0 else float("nan"),
            mean_weight=self._mean.value(),
            unmatched_share=unmatched / decisions if decisions else float("nan"),
            smallest_propensity=self._smallest,
            target_without_support=unsupported / known if known else float("nan"),
            warnings=(),
        )
        return found._replace(warnings=tuple(_warnings(found)))

    def state(self) -> State:
        weights = {f"weight.{key}": column for key, column in self._mean.state().items()}
        return {**weights, "sums": self._sums.copy(), "range": np.array([self._largest, self._smallest])}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        overlap = cls()
        overlap._mean = RatioInterval.from_state(under(state, "weight."))
        overlap._sums = np.array(state["sums"], np.float64)
        overlap._largest, overlap._smallest = np.asarray(state["range"], np.float64).tolist()
        return overlap


def _warnings(found: Diagnostics) -> list[str]:
    said = []
    if found.effective_size < FEWEST_EFFECTIVE or found.effective_share < SMALLEST_SHARE:
        said.append(
            f"effective sample size {found.effective_size:.0f} of {found.decisions} decisions: a few decisions carry the estimates; "
            f"normal intervals need about {FEWEST_EFFECTIVE}"
        )
    if found.rewarded < FEWEST_REWARDED:
        said.append(
            f"{found.rewarded} of {found.decisions} decisions have a reward that counts for the target: "
            f"intervals are rough below {FEWEST_REWARDED}"
        )
    if found.largest_weight_share > LARGEST_SHARE:
        said.append(f"one decision of weight {found.largest_weight:.4g} carries {found.largest_weight_share:.1%} of all weight")
    mean = found.mean_weight
    if abs(mean.value - 1) > 1e-6 and not mean.covers(1):
        said.append(
            f"mean weight {mean.value:.4g} ({mean.low:.4g} to {mean.high:.4g}) should be 1: propensities are wrong, "
            "or the target takes actions that the log cannot contain"
        )
    if found.target_without_support > 0:
        said.append(
            f"{found.target_without_support:.2%} of the target's decisions fall on actions that the log does not support: "
            "IPS misses what they earn, the direct method guesses it"
        )
    if found.decisions and found.unmatched_share == 1:
        said.append("the target takes none of the logged actions: nothing can be estimated")
    if found.smallest_propensity < TINY_PROPENSITY:
        said.append(f"smallest propensity {found.smallest_propensity:.2g}: let the logging policy explore more, or clip")
    return said
