"""What single features do to a score: the score less the score with that feature at its default.

Shape legend: K candidates that are explained, F columns.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.predictor.engine import Engine
from ninerank.predictor.request import RankInput

__all__ = ["Explained", "explain"]


@dataclass(frozen=True)
class Explained:
    """contributions_KF: score less the score without the feature. baseline_K: score with every feature at its default."""

    features: tuple[str, ...]
    contributions_KF: npt.NDArray[np.float32]
    baseline_K: npt.NDArray[np.float32]


def explain(
    engine: Engine, rank_input: RankInput, chosen_K: npt.NDArray[np.int64], score_K: npt.NDArray[np.float32], task: int
) -> Generator[None, Any, Explained]:
    """Explanations of the candidates `chosen_K`, whose scores of `task` are `score_K`; one pass a column, a yield after each."""
    user, items = rank_input.user, rank_input.items.take(pa.array(chosen_K))
    without = []
    for column in user.schema.names:
        without.append(engine.rank(RankInput(_blank(user, column), items)).scores_NT[:, task])
        yield
    for column in items.schema.names:
        without.append(engine.rank(RankInput(user, _blank(items, column))).scores_NT[:, task])
        yield
    nothing = RankInput(_blank(user, *user.schema.names), _blank(items, *items.schema.names))
    baseline_K = engine.rank(nothing).scores_NT[:, task]
    return Explained((*user.schema.names, *items.schema.names), score_K[:, None] - np.stack(without, 1), baseline_K)


def _blank(rows: pa.RecordBatch, *columns: str) -> pa.RecordBatch:
    """The rows with all values of `columns` missing."""
    arrays = [
        pa.nulls(rows.num_rows, array.type) if name in columns else array
        for name, array in zip(rows.schema.names, rows.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=rows.schema) if arrays else rows
