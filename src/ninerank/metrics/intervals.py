"""An estimate with its confidence interval, and the normal one that most of them are."""

import math
from statistics import NormalDist
from typing import NamedTuple

__all__ = ["Interval", "check_level", "normal_interval", "normal_quantile", "student_quantile"]


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


def normal_interval(value: float, variance: float, level: float = 0.95, degrees: int | None = None) -> Interval:
    """value +- z sqrt(variance), z the quantile of the normal distribution, or of Student's with so many degrees of freedom.

    >>> [round(bound, 2) for bound in normal_interval(1.0, 0.25)[:4]]
    [1.0, 0.02, 1.98, 0.5]
    """
    error = math.sqrt(variance) if variance >= 0 else float("nan")
    half = (normal_quantile(level) if degrees is None else student_quantile(level, degrees)) * error
    return Interval(value, value - half, value + half, error, level)


def normal_quantile(level: float) -> float:
    """Half the width of the interval at `level`, in standard errors."""
    return NormalDist().inv_cdf(0.5 + check_level(level) / 2)


def student_quantile(level: float, degrees: int) -> float:
    """The same where the error itself is estimated from `degrees` + 1 values; `normal_quantile` for many (Student 1908).

    Exact for 1 and 2 degrees, to 2% from 3 on and 0.1% from 10 on (expansion in 1 / degrees, Abramowitz & Stegun 26.7.5).

    >>> round(student_quantile(0.95, 10), 3), round(student_quantile(0.95, 1000), 3)
    (2.228, 1.962)
    """
    z = normal_quantile(level)
    if degrees == 1:
        return math.tan(math.pi * level / 2)
    if degrees == 2:
        return level * math.sqrt(2 / (1 - level * level))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    quantile: float = z + sum(term / degrees ** (power + 1) for power, term in enumerate(terms))
    return quantile


def check_level(level: float) -> float:
    """`level`; raises ValueError for one that is no confidence level."""
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level}: a number between 0 and 1 is needed, 0.95 for instance")
    return level
