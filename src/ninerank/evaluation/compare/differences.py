"""Metrics of two models over the same rows, and their paired differences, B less A, clustered by request.

Shape legend: M rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ninerank.evaluation.compare.rules import METRICS, MetricName, Rules
from ninerank.evaluation.compare.scoring import Compared
from ninerank.evaluation.compare.sequential import always_valid, always_valid_p, holm
from ninerank.evaluation.quality import finite
from ninerank.evaluation.slices import ColumnCodes
from ninerank.metrics import GAUC, NDCG, LogLoss, NormalizedEntropy, auc, auc_difference, metric_difference, ratio_interval
from ninerank.metrics.intervals import Interval

__all__ = ["Difference", "differences", "sliced"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """a, b: values of the metric. fixed: interval of b - a at this sample size. always: the same, valid however often one looks.

    p_value: always valid, of no difference; adjusted: the same after Holm's correction over the comparisons it was made with.
    """

    metric: MetricName
    a: float
    b: float
    fixed: Interval
    always: Interval
    num_rows: int
    num_requests: int
    p_value: float
    adjusted: float

    @property
    def gain(self) -> float:
        """How much better B is; below 0: worse."""
        return self.fixed.value if METRICS[self.metric] else -self.fixed.value

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "metric": self.metric,
            "a": finite(self.a),
            "b": finite(self.b),
            "difference": finite(self.fixed.value),
            "interval": [finite(self.fixed.low), finite(self.fixed.high)],
            "always_valid_interval": [finite(self.always.low), finite(self.always.high)],
            "rows": self.num_rows,
            "requests": self.num_requests,
            "p_value": finite(self.p_value),
            "adjusted_p_value": finite(self.adjusted),
        }


def differences(compared: Compared, rules: Rules) -> dict[MetricName, Difference]:
    """Every metric over all rows. The primary one is decided by its own p-value; the others are corrected among each other."""
    rows = (compared.label_M, compared.a_M, compared.b_M, compared.request_M)
    found = {name: _difference(name, *rows, rules) for name in METRICS}
    others = [name for name in METRICS if name != rules.primary]
    for name, adjusted in zip(others, holm([found[name].p_value for name in others]), strict=True):
        found[name] = replace(found[name], adjusted=adjusted)
    return found


def sliced(compared: Compared, rules: Rules) -> dict[str, dict[str, Difference]]:
    """The primary metric by value of every sliced column, corrected over all slices of all columns."""
    found: dict[str, dict[str, Difference]] = {}
    for column, values in compared.slices.items():
        codes = ColumnCodes(column, rules.max_slices)
        code_M = np.concatenate([codes.encode(chunk) for chunk in values.chunks]) if values.num_chunks else np.empty(0, np.int32)
        names, place_M = codes.places(code_M, None)
        found[column] = {}
        for place, name in enumerate(names):
            own = place_M == place
            if own.any():
                rows = (compared.label_M[own], compared.a_M[own], compared.b_M[own], compared.request_M[own])
                found[column][name] = _difference(rules.primary, *rows, rules)
    flat = [(column, name) for column, own in found.items() for name in own]
    for (column, name), adjusted in zip(flat, holm([found[column][name].p_value for column, name in flat]), strict=True):
        found[column][name] = replace(found[column][name], adjusted=adjusted)
    return found


def _difference(metric: MetricName, label_M: Array, a_M: Array, b_M: Array, request_M: Array, rules: Rules) -> Difference:
    a, b, fixed, num_units = _MEASURES[metric](label_M, a_M, b_M, request_M, rules)
    p_value = always_valid_p(fixed, num_units, horizon=rules.horizon)
    always = always_valid(fixed, num_units, horizon=rules.horizon)
    return Difference(metric, a, b, fixed, always, len(label_M), len(np.unique(request_M)), p_value, p_value)


Measured = tuple[float, float, Interval, int]


def _auc(label_M: Array, a_M: Array, b_M: Array, request_M: Array, rules: Rules) -> Measured:
    if label_M.min(initial=1) == label_M.max(initial=0):
        return _nothing(rules)
    found = auc_difference(label_M, b_M, a_M, cluster_N=request_M, level=rules.level)
    return auc(label_M, a_M), auc(label_M, b_M), found, len(np.unique(request_M))


def _gauc(label_M: Array, a_M: Array, b_M: Array, request_M: Array, rules: Rules) -> Measured:
    tables = [GAUC().update(label_M, score_M, group_B=request_M).groups() for score_M in (a_M, b_M)]
    known = np.isfinite(tables[0].auc_G)
    return _by_request(tables[0].auc_G[known], tables[1].auc_G[known], tables[0].weight_G[known], rules)


def _ndcg(label_M: Array, a_M: Array, b_M: Array, request_M: Array, rules: Rules) -> Measured:
    tables = [NDCG(rules.top_k).update(label_M, score_M, group_B=request_M).groups() for score_M in (a_M, b_M)]
    return _by_request(tables[0].value_G, tables[1].value_G, tables[0].weight_G, rules)


def _by_request(a_G: Array, b_G: Array, weight_G: Array, rules: Rules) -> Measured:
    if len(a_G) == 0:
        return _nothing(rules)
    total = weight_G.sum()
    found = ratio_interval(weight_G * (b_G - a_G), weight_G, level=rules.level)
    return float((weight_G * a_G).sum() / total), float((weight_G * b_G).sum() / total), found, len(a_G)


def _sums(metric: "type[LogLoss] | type[NormalizedEntropy]") -> Callable[[Array, Array, Array, Array, Rules], Measured]:
    def measure(label_M: Array, a_M: Array, b_M: Array, request_M: Array, rules: Rules) -> Measured:
        a, b = (metric().update(label_M, score_M).value() for score_M in (a_M, b_M))
        found = metric_difference(metric, label_M, b_M, a_M, cluster_N=request_M, level=rules.level)
        return a, b, found, len(np.unique(request_M))

    return measure


def _nothing(rules: Rules) -> Measured:
    nan = float("nan")
    return nan, nan, Interval(nan, nan, nan, nan, rules.level), 0


_MEASURES: dict[MetricName, Callable[[Array, Array, Array, Array, Rules], Measured]] = {
    "auc": _auc,
    "gauc": _gauc,
    "logloss": _sums(LogLoss),
    "ne": _sums(NormalizedEntropy),
    "ndcg": _ndcg,
}
