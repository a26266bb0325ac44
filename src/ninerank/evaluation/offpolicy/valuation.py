"""All estimates of one target policy, with intervals, lifts over the logging policy and diagnostics, as one accumulator.

Shape legend: N decisions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.evaluation.offpolicy.diagnostics import Diagnostics, Overlap
from ninerank.evaluation.offpolicy.estimators import ALL, Estimator
from ninerank.evaluation.offpolicy.feedback import Feedback
from ninerank.metrics.accumulator import Accumulator, State, ratio, under
from ninerank.metrics.clusters import ClusterSums
from ninerank.metrics.intervals import Interval, check_level
from ninerank.metrics.rows import Array

__all__ = ["OffPolicy", "Valuation", "estimate"]


@dataclass(frozen=True)
class Valuation:
    """logged: mean reward of the logging policy. estimates: value of the target by estimator. lifts: estimate - logged, paired."""

    logged: Interval
    estimates: dict[str, Interval]
    lifts: dict[str, Interval]
    diagnostics: Diagnostics

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what has no value is None."""
        diagnostics = {key: _plain(value) for key, value in self.diagnostics._asdict().items()}
        return {
            "logged": _plain(self.logged),
            "estimates": {name: {**_plain(own), "lift": _plain(self.lifts[name])} for name, own in self.estimates.items()},
            "diagnostics": diagnostics,
        }


class OffPolicy(Accumulator):
    """Takes logged decisions as they stream by; `value()` has every estimate. Merges over any split of the rows.

    estimators: by default all; those that need a reward model are left out of a log without one.

    >>> rows = Feedback.of([1, 0, 1, 0], [0.5, 0.5, 0.25, 0.25], [0.5, 0.25, 0.5, 0.0])
    >>> round(OffPolicy().update(rows).value().estimates["ips"].value, 4)
    0.75
    """

    def __init__(self, estimators: Sequence[Estimator] = ALL, level: float = 0.95) -> None:
        names = [estimator.name for estimator in estimators]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"estimators {', '.join(names)}: one or more are needed, each once")
        self.level = check_level(level)
        self._wanted, self._estimators = tuple(estimators), tuple(estimators)
        self._clusters: ClusterSums | None = None
        self._overlap = Overlap()

    def update(self, rows: Feedback, unsupported_N: Array | None = None) -> Self:
        """unsupported_N: see `Overlap.note_support`."""
        if self._clusters is None:
            self._begin(with_model=rows.model_N is not None)
        elif any(e.needs_model for e in self._wanted) and self._has_model() != (rows.model_N is not None):
            raise DataError("some decisions come with a reward model's expectations and some without: all or none are needed")
        assert self._clusters is not None
        if len(rows):
            logged = np.stack([rows.reward_N, np.ones(len(rows))])
            self._clusters.add(np.concatenate([logged, *(e.terms(rows) for e in self._estimators)]), rows.cluster_N)
        self._overlap.update(rows)
        if unsupported_N is not None:
            self._overlap.note_support(unsupported_N)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        if other._clusters is None:
            return self
        if self._clusters is None:
            self._begin(with_model=other._has_model())
        assert self._clusters is not None
        if self._estimators != other._estimators:
            raise ValueError("valuations by other estimators, or with and without a reward model, do not merge")
        self._clusters.merge(other._clusters)
        self._overlap.merge(other._overlap)
        return self

    def value(self) -> Valuation:
        if self._clusters is None:
            raise DataError("no decisions were given, nothing can be estimated")
        estimates, lifts, start = {}, {}, 2
        for estimator in self._estimators:
            own = slice(start, start + estimator.num_sums)
            start = own.stop
            estimates[estimator.name] = self._clusters.interval(partial(_estimate, estimator, own), self.level)
            lifts[estimator.name] = self._clusters.interval(partial(_lift, estimator, own), self.level)
        return Valuation(self._clusters.interval(_logged, self.level), estimates, lifts, self._overlap.value())

    def state(self) -> State:
        found = {f"overlap.{key}": column for key, column in self._overlap.state().items()}
        if self._clusters is not None:
            found |= {f"sums.{key}": column for key, column in self._clusters.state().items()}
        return {**found, "model": np.array(self._has_model()), "level": np.array(self.level)}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        """Of a valuation by all estimators; others: `OffPolicy(estimators, level).merge_state(state)`."""
        return cls(level=float(state["level"])).merge_state(state)

    def merge_state(self, state: Mapping[str, Array]) -> Self:
        """Take in what a valuation by the same estimators had seen."""
        sums = under(state, "sums.")
        if sums:
            if self._clusters is None:
                self._begin(with_model=bool(state["model"]))
            assert self._clusters is not None
            self._clusters.merge_state(sums)
        self._overlap.merge(Overlap.from_state(under(state, "overlap.")))
        return self

    def _begin(self, *, with_model: bool) -> None:
        self._estimators = tuple(e for e in self._wanted if with_model or not e.needs_model)
        if not self._estimators:
            raise DataError(f"{', '.join(e.name for e in self._wanted)}: a reward model is needed, and the log has none")
        self._clusters = ClusterSums(2 + sum(e.num_sums for e in self._estimators))

    def _has_model(self) -> bool:
        return any(e.needs_model for e in self._estimators)


def estimate(rows: Feedback, estimators: Sequence[Estimator] = ALL, level: float = 0.95) -> Valuation:
    """`OffPolicy` of all decisions at once."""
    return OffPolicy(estimators, level).update(rows).value()


def _logged(sums_SR: Array) -> Array:
    return ratio(sums_SR[0], sums_SR[1])


def _estimate(estimator: Estimator, own: slice, sums_SR: Array) -> Array:
    return estimator.of(sums_SR[own])


def _lift(estimator: Estimator, own: slice, sums_SR: Array) -> Array:
    return estimator.of(sums_SR[own]) - _logged(sums_SR)


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {key: _plain(own) for key, own in value._asdict().items()}
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
