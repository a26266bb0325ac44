"""Intervals and p-values that hold however often one looks at growing data, and control over many comparisons.

A fixed-sample interval holds at one look; who looks daily and stops when it excludes 0 is wrong far more often than 5% of the time.
The asymptotic confidence sequence holds at all sample sizes at once (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas 2021, "Time-uniform
central limit theory and asymptotic confidence sequences"): with n independent units, standard error s of the estimate and V = n rho^2,

    half width = s sqrt(2 (V + 1) / V * log(sqrt(V + 1) / alpha))

rho is chosen so that the sequence is tightest near `horizon` units; any choice made before looking is valid.
"""

import math
from collections.abc import Sequence

from ninerank.metrics.intervals import Interval, check_level

__all__ = ["always_valid", "always_valid_p", "holm"]


def _variance_ratio(num_units: int, level: float, horizon: int) -> float:
    """V at `num_units`."""
    log_alpha = math.log(1 - check_level(level))
    return num_units * (-2 * log_alpha + math.log(-2 * log_alpha + 1)) / horizon


def always_valid(found: Interval, num_units: int, *, horizon: int) -> Interval:
    """The interval of an estimate over `num_units` requests or users, valid at every sample size; nan where it has no standard error."""
    if num_units < 2 or not math.isfinite(found.standard_error):
        return found._replace(low=math.nan, high=math.nan)
    ratio = _variance_ratio(num_units, found.level, horizon)
    half = found.standard_error * math.sqrt(2 * (ratio + 1) / ratio * math.log(math.sqrt(ratio + 1) / (1 - found.level)))
    return found._replace(low=found.value - half, high=found.value + half)


def always_valid_p(found: Interval, num_units: int, *, horizon: int) -> float:
    """The smallest alpha whose sequence, with rho kept, excludes 0: an always valid p-value of no difference; 1 where unknown."""
    if num_units < 2 or not math.isfinite(found.standard_error):
        return 1.0
    if found.standard_error == 0:
        return 1.0 if found.value == 0 else 0.0
    ratio = _variance_ratio(num_units, found.level, horizon)
    z = found.value / found.standard_error
    return min(1.0, math.sqrt(ratio + 1) * math.exp(-z * z * ratio / (2 * (ratio + 1))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given, which control the chance of any false finding among them (Holm 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, k in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[k]))
        adjusted[k] = highest
    return adjusted
