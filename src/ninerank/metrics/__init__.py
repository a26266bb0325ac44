"""Metrics of click-through-rate models: NumPy only, streaming, mergeable over any split of the rows.

Each is an accumulator (`.update(label_B, score_B, weight_B=None)`, `.merge(other)`, `.value()`, `.state()`) and a
function for rows that are all at hand. Labels are 0 or 1; scores are finite, and probabilities wherever their size matters.

>>> whole = AUC().update([0, 1], [0.2, 0.7]).merge(AUC().update([1, 0], [0.4, 0.5]))
>>> whole.value() == auc([0, 1, 1, 0], [0.2, 0.7, 0.4, 0.5]) == 0.75
True
"""

from ninerank.metrics.accumulator import Accumulator
from ninerank.metrics.bootstrap import Bootstrap, auc_bootstrap, bootstrap, poisson_weights
from ninerank.metrics.bucketed import BoundedAUC, BucketedAUC, bucketed_auc
from ninerank.metrics.calibration import PCOC, Buckets, Calibration, ScoreHistogram, calibration, ece, pcoc
from ninerank.metrics.catalogue import ItemCounts, coverage, novelty, top_k
from ninerank.metrics.delong import AUCDifference, AUCInterval, auc_difference, auc_interval
from ninerank.metrics.delta import MetricDifference, MetricInterval, RatioInterval, metric_difference, metric_interval, ratio_interval
from ninerank.metrics.intervals import Interval, normal_interval
from ninerank.metrics.likelihood import (
    CLIP,
    LogLoss,
    NormalizedEntropy,
    RelativeInformationGain,
    logloss,
    normalized_entropy,
    relative_information_gain,
)
from ninerank.metrics.lists import MAP, MRR, NDCG, HitRate, ListTable, average_precision, hit_rate, ndcg, reciprocal_rank
from ninerank.metrics.multitask import Conversion, ConversionTable, PerTask, TaskQuality
from ninerank.metrics.ranking import AUC, GAUC, GroupTable, RocCurve, auc, gauc, roc_curve
from ninerank.metrics.recalibration import Recalibration
from ninerank.metrics.sampling import restore_scores, sampling_weights
from ninerank.metrics.sliced import Sliced, time_slices

__all__ = [
    "AUC",
    "AUCDifference",
    "AUCInterval",
    "Accumulator",
    "Bootstrap",
    "BoundedAUC",
    "BucketedAUC",
    "Buckets",
    "CLIP",
    "Calibration",
    "Conversion",
    "ConversionTable",
    "GAUC",
    "GroupTable",
    "HitRate",
    "Interval",
    "ItemCounts",
    "ListTable",
    "LogLoss",
    "MAP",
    "MRR",
    "MetricDifference",
    "MetricInterval",
    "NDCG",
    "NormalizedEntropy",
    "PCOC",
    "PerTask",
    "RatioInterval",
    "Recalibration",
    "RelativeInformationGain",
    "RocCurve",
    "ScoreHistogram",
    "Sliced",
    "TaskQuality",
    "auc",
    "auc_bootstrap",
    "auc_difference",
    "auc_interval",
    "average_precision",
    "bootstrap",
    "bucketed_auc",
    "calibration",
    "coverage",
    "ece",
    "gauc",
    "hit_rate",
    "logloss",
    "metric_difference",
    "metric_interval",
    "ndcg",
    "normal_interval",
    "normalized_entropy",
    "novelty",
    "pcoc",
    "poisson_weights",
    "ratio_interval",
    "reciprocal_rank",
    "relative_information_gain",
    "restore_scores",
    "roc_curve",
    "sampling_weights",
    "time_slices",
    "top_k",
]
