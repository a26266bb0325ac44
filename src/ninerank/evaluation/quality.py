"""All metrics of one set of scored rows, as one accumulator.

Shape legend: B rows of one update.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.metrics import AUC, GAUC, Buckets, LogLoss, NormalizedEntropy, RocCurve, ScoreHistogram
from ninerank.metrics.rows import check_rows

__all__ = ["NUM_BUCKETS", "Quality", "Summary", "finite"]

NUM_BUCKETS = 20


@dataclass(frozen=True)
class Summary:
    """Metrics of a set of rows; nan where one has no value (no rows, or one class only).

    rows: number of rows. weight: sum of their weights (rows, if there are none). positive_rate, mean_score: weighted.
    gauc: None where there are no groups. ece: over 20 buckets of equal mass.
    """

    rows: int
    weight: float
    positive_rate: float
    mean_score: float
    auc: float
    gauc: float | None
    logloss: float
    ne: float
    pcoc: float
    ece: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what has no value is None."""
        return {key: finite(value) for key, value in asdict(self).items()}


class Quality:
    """Takes labels, scores, weights and groups as they stream by; `summary()`, `buckets()`, `curve()` at the end.

    Merges like the metrics it is made of. Raises DataError for rows they refuse.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._auc, self._gauc = AUC(), GAUC()
        self._ne, self._logloss = NormalizedEntropy(), LogLoss()
        self.histogram = ScoreHistogram()

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None, group_B: ArrayLike | None = None) -> Self:
        rows = check_rows(label_B, score_B, weight_B, probability=True)
        for metric in (self._auc, self._ne, self._logloss, self.histogram):
            metric.update(rows.label_B, rows.score_B, rows.weight_B)
        if group_B is not None:
            self._gauc.update(rows.label_B, rows.score_B, rows.weight_B, group_B)
        self._rows += len(rows)
        return self

    def merge(self, other: Self) -> Self:
        self._rows += other._rows
        self._auc.merge(other._auc)
        self._gauc.merge(other._gauc)
        self._ne.merge(other._ne)
        self._logloss.merge(other._logloss)
        self.histogram.merge(other.histogram)
        return self

    def summary(self) -> Summary:
        weight, positive, score = self.histogram.totals()
        return Summary(
            rows=self._rows,
            weight=weight,
            positive_rate=positive / weight if weight else math.nan,
            mean_score=score / weight if weight else math.nan,
            auc=self._auc.value(),
            gauc=self._gauc.value() if self._gauc.num_rows else None,
            logloss=self._logloss.value(),
            ne=self._ne.value(),
            pcoc=score / positive if positive else math.nan,
            ece=self.buckets().ece,
        )

    def buckets(self, num_buckets: int = NUM_BUCKETS) -> Buckets:
        """Calibration in buckets of equal mass."""
        return self.histogram.equal_mass(num_buckets)

    def curve(self, max_points: int = 256) -> RocCurve:
        return self._auc.curve(max_points)


def finite(value: Any) -> Any:
    """The value, or None for a float that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
