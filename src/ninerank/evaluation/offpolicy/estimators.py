"""What a policy would have earned, from the log of another one: each estimator as its paper has it.

Each is a function of a few sums over the decisions, so that shards merge, and its interval follows by the delta method
with requests or users as clusters. Notation: r reward, w = pi(a | x) / pi_0(a | x) importance weight, q(x, a) expected reward
of a model, q(x, pi) = sum_a pi(a | x) q(x, a), n decisions.

Shape legend: N decisions, S sums, R columns of sums.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ninerank.errors import DataError
from ninerank.evaluation.offpolicy.feedback import Feedback
from ninerank.metrics.accumulator import ratio
from ninerank.metrics.rows import Array

__all__ = ["ALL", "DR", "IPS", "SNDR", "SNIPS", "ClippedIPS", "DRos", "DirectMethod", "Estimator", "SwitchDR"]


@dataclass(frozen=True)
class Estimator(ABC):
    """Base: `terms` gives each decision's share of the sums, `of` the estimate of given sums."""

    name: ClassVar[str]
    needs_model: ClassVar[bool] = False
    num_sums: ClassVar[int] = 2

    @abstractmethod
    def terms(self, rows: Feedback) -> Array:
        """float64 (S, N). Raises DataError where a reward model is needed and missing."""

    def of(self, sums_SR: Array) -> Array:
        """float64 (R,): mean of the first sum, the second one counting the decisions."""
        return ratio(sums_SR[0], sums_SR[1])

    def _mean_of(self, value_N: Array) -> Array:
        return np.stack([value_N, np.ones(len(value_N))])

    def _model(self, rows: Feedback) -> tuple[Array, Array]:
        if rows.model_N is None or rows.base_N is None:
            raise DataError(f"{self.name} needs a reward model's expectations, and the log has none: give model and base, or choose IPS")
        return rows.model_N, rows.base_N


@dataclass(frozen=True)
class IPS(Estimator):
    """Inverse propensity scoring: V = 1/n sum_i w_i r_i (Horvitz & Thompson 1952; Strehl et al. 2010).

    Unbiased where pi_0 > 0 wherever pi > 0 and the propensities are right; its variance grows with the weights.
    """

    name: ClassVar[str] = "ips"

    def terms(self, rows: Feedback) -> Array:
        return self._mean_of(rows.weight_N * rows.reward_N)


@dataclass(frozen=True)
class ClippedIPS(Estimator):
    """IPS with weights cut off: V = 1/n sum_i min(w_i, M) r_i (Ionides 2008; Bottou et al. 2013).

    Biased towards 0 for rewards >= 0 where weights above M occur; the variance is bounded by M.
    """

    name: ClassVar[str] = "clipped_ips"
    largest: float = 10.0

    def terms(self, rows: Feedback) -> Array:
        return self._mean_of(np.minimum(rows.weight_N, self.largest) * rows.reward_N)


@dataclass(frozen=True)
class SNIPS(Estimator):
    """Self-normalised IPS: V = sum_i w_i r_i / sum_i w_i (Swaminathan & Joachims 2015, "The Self-Normalized Estimator").

    Consistent, bounded by the rewards, and unharmed by a constant added to them.
    """

    name: ClassVar[str] = "snips"

    def terms(self, rows: Feedback) -> Array:
        return np.stack([rows.weight_N * rows.reward_N, rows.weight_N])


@dataclass(frozen=True)
class DirectMethod(Estimator):
    """The reward model alone: V = 1/n sum_i q(x_i, pi) (Beygelzimer & Langford 2009). As biased as the model is; no weights."""

    name: ClassVar[str] = "dm"
    needs_model: ClassVar[bool] = True

    def terms(self, rows: Feedback) -> Array:
        return self._mean_of(self._model(rows)[1])


@dataclass(frozen=True)
class DR(Estimator):
    """Doubly robust: V = 1/n sum_i [q(x_i, pi) + w_i (r_i - q(x_i, a_i))] (Dudik, Langford & Li 2011).

    Unbiased if either the propensities or the model are right.
    """

    name: ClassVar[str] = "dr"
    needs_model: ClassVar[bool] = True

    def terms(self, rows: Feedback) -> Array:
        model_N, base_N = self._model(rows)
        return self._mean_of(base_N + self.shrunk(rows.weight_N) * (rows.reward_N - model_N))

    def shrunk(self, weight_N: Array) -> Array:
        """The weight of the model's error, from the importance weight."""
        return weight_N


@dataclass(frozen=True)
class SNDR(DR):
    """Self-normalised DR: V = 1/n sum_i q(x_i, pi) + sum_i w_i (r_i - q(x_i, a_i)) / sum_i w_i (Thomas & Brunskill 2016)."""

    name: ClassVar[str] = "sndr"
    num_sums: ClassVar[int] = 4

    def terms(self, rows: Feedback) -> Array:
        model_N, base_N = self._model(rows)
        return np.concatenate([self._mean_of(base_N), [rows.weight_N * (rows.reward_N - model_N), rows.weight_N]])

    def of(self, sums_SR: Array) -> Array:
        return ratio(sums_SR[0], sums_SR[1]) + ratio(sums_SR[2], sums_SR[3])


@dataclass(frozen=True)
class SwitchDR(DR):
    """DR where weights are small, the model alone where they are not: the error counts by w 1{w <= tau} (Wang, Agarwal & Dudik 2017)."""

    name: ClassVar[str] = "switch_dr"
    threshold: float = 10.0

    def shrunk(self, weight_N: Array) -> Array:
        return np.where(weight_N <= self.threshold, weight_N, 0.0)


@dataclass(frozen=True)
class DRos(DR):
    """DR with optimistic shrinkage: the error counts by lambda w / (w^2 + lambda) (Su, Dimakopoulou, Krishnamurthy & Dudik 2020).

    lambda = 0 is the direct method, infinity is DR; between them it trades bias for variance.
    """

    name: ClassVar[str] = "dros"
    shrinkage: float = 100.0

    def shrunk(self, weight_N: Array) -> Array:
        if np.isinf(self.shrinkage):
            return weight_N
        return self.shrinkage * weight_N / np.where(weight_N > 0, weight_N**2 + self.shrinkage, 1.0)


ALL: tuple[Estimator, ...] = (IPS(), ClippedIPS(), SNIPS(), DirectMethod(), DR(), SNDR(), SwitchDR(), DRos())
