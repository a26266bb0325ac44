"""An estimate with its confidence interval, and the normal one that most of them are."""

import math
from statistics import NormalDist
from typing import NamedTuple

__all__ = ["Interval", "check_level", "normal_interval", "normal_quantile"]


class Interval(NamedTuple):
    """Estimate, bounds of its confidence interval at `level`, and its standard error; nan where there is none."""

    value: float
    low: float
    high: float
    standard_error: float
    level: float = 0.95

    @property
    def p_value(self) -> float:
        """Two-sided p-value of "the true value is 0", by the normal distribution: for differences."""
        if math.isnan(self.value) or math.isnan(self.standard_error):
            return float("nan")
        if self.standard_error == 0:
            return 1.0 if self.value == 0 else 0.0
        return math.erfc(abs(self.value) / self.standard_error / math.sqrt(2))

    def covers(self, truth: float) -> bool:
        """Whether `truth` lies within the bounds."""
        return self.low <= truth <= self.high


def normal_interval(value: float, variance: float, level: float = 0.95) -> Interval:
    """value +- z sqrt(variance), z the quantile of the normal distribution.

    >>> [round(bound, 2) for bound in normal_interval(1.0, 0.25)[:4]]
    [1.0, 0.02, 1.98, 0.5]
    """
    error = math.sqrt(variance) if variance >= 0 else float("nan")
    half = normal_quantile(level) * error
    return Interval(value, value - half, value + half, error, level)


def normal_quantile(level: float) -> float:
    """Half the width of the interval at `level`, in standard errors."""
    return NormalDist().inv_cdf(0.5 + check_level(level) / 2)


def check_level(level: float) -> float:
    """`level`; raises ValueError for one that is no confidence level."""
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level}: a number between 0 and 1 is needed, 0.95 for instance")
    return level
