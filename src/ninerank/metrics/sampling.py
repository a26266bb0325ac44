"""Down-sampled negatives: scores and weights as they would be had every row been kept.

Training often keeps each negative with a chance r (`rate`) alone. A model of such rows predicts too many clicks, and
metrics of such rows count too few negatives; positives are always kept.
"""

import numpy as np
from numpy.typing import ArrayLike

from ninerank.errors import DataError
from ninerank.metrics.rows import Array, check_rows

__all__ = ["restore_scores", "sampling_weights"]


def restore_scores(score_N: ArrayLike, rate: float) -> Array:
    """Probabilities of a model trained on down-sampled negatives, as they hold for all rows: q = p / (p + (1 - p) / r).

    He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", section 6.3. The order of the scores
    stays, so AUC does not change. float64 (N,). Raises DataError for scores outside [0, 1], or a rate outside (0, 1].

    >>> restore_scores([0.5, 0.0, 1.0], 0.1).round(4).tolist()
    [0.0909, 0.0, 1.0]
    """
    _check_rate(rate)
    scores = np.asarray(score_N)
    score = check_rows(np.zeros(scores.shape, bool), scores, probability=True).score_B.astype(np.float64)
    restored: Array = score * rate / (score * rate + (1 - score))
    return restored


def sampling_weights(label_N: ArrayLike, rate: float) -> Array:
    """Weights by which metrics of down-sampled rows estimate those of all rows: 1 for a positive, 1 / r for a negative.

    Horvitz & Thompson 1952. float64 (N,). Raises DataError for labels other than 0 and 1, or a rate outside (0, 1].

    >>> sampling_weights([1, 0], 0.1).tolist()
    [1.0, 10.0]
    """
    _check_rate(rate)
    labels = np.asarray(label_N)
    return np.where(check_rows(labels, np.zeros(labels.shape)).label_B, 1.0, 1 / rate)


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise DataError(f"the share of negatives that were kept is {rate}: a number above 0 and at most 1 is needed")
