"""Scored rows as the metrics take them: checked once, here.

Shape legend: B rows of one update.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ninerank.errors import DataError

__all__ = ["Array", "Rows", "check_groups", "check_rows"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """Checked rows: label_B bool, or float64 if graded; score_B float32 or float64; weight_B float64, None where all are 1."""

    label_B: Array
    score_B: Array
    weight_B: Array | None

    def __len__(self) -> int:
        return len(self.label_B)

    def weighted(self, *columns_B: Array | float) -> Array:
        """float64 (len(columns_B), B): columns, each value times its row's weight."""
        table = np.empty((len(columns_B), len(self)))
        for row, column in zip(table, columns_B, strict=True):
            row[:] = column
        if self.weight_B is not None:
            table *= self.weight_B
        return table


def check_rows(
    label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None, *, probability: bool = False, graded: bool = False
) -> Rows:
    """Check one update; raises DataError for a shape, label, score or weight that is not allowed.

    float32 scores stay float32 (float16 is widened to it), everything else becomes float64; -0.0 becomes 0.0.
    With `probability` scores must lie in [0, 1]. With `graded` labels are gains, finite numbers >= 0.

    >>> check_rows([0, 2], [0.1, 0.2])
    Traceback (most recent call last):
    ...
    ninerank.errors.DataError: label 2 in row 1: 0 or 1 is needed
    """
    labels, scores = _column("labels", label_B), _column("scores", score_B)
    if len(labels) != len(scores):
        raise DataError(f"{len(labels)} labels for {len(scores)} scores: one of each per row is needed")
    scores = scores.astype(np.float32 if scores.dtype in (np.float32, np.float16) else np.float64)
    scores += 0.0  # -0.0 becomes 0.0
    _refuse("score", scores, ~np.isfinite(scores), "finite numbers are needed")
    if probability:
        _refuse("score", scores, (scores < 0) | (scores > 1), "a probability in [0, 1] is needed (is this a logit?)")
    if graded:
        labels = labels.astype(np.float64)
        _refuse("label", labels, ~(np.isfinite(labels) & (labels >= 0)), "a finite number >= 0 is needed")
    elif labels.dtype != np.bool_:
        _refuse("label", labels, (labels != 0) & (labels != 1), "0 or 1 is needed")
        labels = labels == 1
    if weight_B is None:
        return Rows(labels, scores, None)
    weights = _column("weights", weight_B).astype(np.float64)
    if len(weights) != len(labels):
        raise DataError(f"{len(weights)} weights for {len(labels)} rows: one per row is needed")
    _refuse("weight", weights, ~(np.isfinite(weights) & (weights >= 0)), "a finite number >= 0 is needed")
    return Rows(labels, scores, weights)


def check_groups(group_B: ArrayLike, num_rows: int, what: str = "groups") -> Array:
    """Group keys as int64; raises DataError for keys that are no integers, or not one per row."""
    keys = np.asarray(group_B)
    if keys.shape != (num_rows,):
        raise DataError(f"{what} have shape {keys.shape}: ({num_rows},) is needed, one key per row")
    if keys.dtype.kind not in "iub":
        raise DataError(f"{what} are {keys.dtype}: integers are needed, encode or hash other keys first")
    return keys.astype(np.uint64).view(np.int64) if keys.dtype == np.uint64 else keys.astype(np.int64)


def _column(what: str, values: ArrayLike) -> Array:
    column = np.asarray(values)
    if column.ndim != 1:
        raise DataError(f"{what} have shape {column.shape}: one dimension is needed, one value per row")
    if column.size and column.dtype.kind not in "biuf":
        raise DataError(f"{what} are {column.dtype}: numbers are needed")
    return column


def _refuse(what: str, values: Array, wrong: Array, allowed: str) -> None:
    if wrong.any():
        row, more = int(wrong.argmax()), int(wrong.sum()) - 1
        raise DataError(f"{what} {values[row].item()!r} in row {row}{f' (and {more} more)' if more else ''}: {allowed}")
