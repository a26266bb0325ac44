"""Metrics of click-through-rate models: NumPy only, streaming, mergeable over any split of the rows.

Each is an accumulator (`.update(label_B, score_B, weight_B=None)`, `.merge(other)`, `.value()`, `.state()`) and a
function for rows that are all at hand. Labels are 0 or 1; scores are finite, and probabilities wherever their size matters.

>>> whole = AUC().update([0, 1], [0.2, 0.7]).merge(AUC().update([1, 0], [0.4, 0.5]))
>>> whole.value() == auc([0, 1, 1, 0], [0.2, 0.7, 0.4, 0.5]) == 0.75
True
"""

from ninerank.metrics.accumulator import Accumulator
from ninerank.metrics.calibration import PCOC, Buckets, Calibration, ScoreHistogram, calibration, ece, pcoc
from ninerank.metrics.likelihood import CLIP, LogLoss, NormalizedEntropy, logloss, normalized_entropy
from ninerank.metrics.ranking import AUC, GAUC, GroupTable, RocCurve, auc, gauc, roc_curve

__all__ = [
    "AUC",
    "CLIP",
    "GAUC",
    "PCOC",
    "Accumulator",
    "Buckets",
    "Calibration",
    "GroupTable",
    "LogLoss",
    "NormalizedEntropy",
    "RocCurve",
    "ScoreHistogram",
    "auc",
    "calibration",
    "ece",
    "gauc",
    "logloss",
    "normalized_entropy",
    "pcoc",
    "roc_curve",
]
