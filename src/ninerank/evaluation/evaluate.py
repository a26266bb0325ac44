"""Log files through a scorer into metrics, whole and by slice: `ninerank evaluate`.

Shape legend: B rows of a record batch, T tasks.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from ninerank.errors import DataError
from ninerank.evaluation.answers import Answers
from ninerank.evaluation.quality import Quality, Summary, finite
from ninerank.evaluation.scorer import ModelInfo, Scorer
from ninerank.evaluation.slices import Slices
from ninerank.features.columns import column_of
from ninerank.metrics import Buckets, RocCurve

__all__ = ["Evaluation", "TaskEvaluation", "evaluate"]


@dataclass(frozen=True)
class TaskEvaluation:
    """One label's metrics. slices: column -> value -> metrics."""

    label: str
    quality: Quality
    summary: Summary
    slices: dict[str, dict[str, Summary]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.summary.as_dict(),
            "calibration": _records(self.quality.buckets()),
            "roc": _records(self.quality.curve(100)),
            "slices": {column: {value: own.as_dict() for value, own in found.items()} for column, found in self.slices.items()},
        }


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated on which files, and each task's metrics. seconds: reading, scoring and measuring."""

    model: ModelInfo
    data: tuple[str, ...]
    rows: int
    seconds: float
    tasks: tuple[TaskEvaluation, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: no NaN, tasks by label."""
        return {
            "model": asdict(self.model),
            "data": list(self.data),
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "rows_per_s": round(self.rows / self.seconds, 1),
            "tasks": {task.label: task.as_dict() for task in self.tasks},
        }


def evaluate(
    scorer: Scorer,
    batches: Iterable[pa.RecordBatch],
    *,
    data: Sequence[str] = (),
    slices: Sequence[str] = (),
    max_values: int = 25,
    on_rows: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Score `batches`, which hold the spec's columns, its labels and the columns of `slices`, and measure.

    data: names of the files, for the report. max_values: slices shown of each column. on_rows: told the rows of each batch.
    Raises DataError for a missing or ill-typed column, a label outside {0, 1}, and where there are no rows.
    """
    started = time.perf_counter()
    labels = scorer.spec.labels
    qualities = [Quality() for _ in labels]
    sliced = [{column: Slices(column, max_values) for column in slices} for _ in labels]
    rows = 0
    for batch in batches:
        scores_BT, answers = scorer.score(batch), Answers.of(batch, scorer.spec)
        for task, (quality, by_column) in enumerate(zip(qualities, sliced, strict=True)):
            scored = (answers.label_BT[:, task], scores_BT[:, task], answers.weight_B, answers.group_B)
            quality.update(*scored)
            for column, own in by_column.items():
                own.update(column_of(batch, column), *scored)
        rows += batch.num_rows
        on_rows(batch.num_rows)
    if rows == 0:
        raise DataError(f"{', '.join(data) or 'the data'}: there are no rows to evaluate on")
    tasks = tuple(
        TaskEvaluation(label, quality, quality.summary(), {column: own.value() for column, own in by_column.items()})
        for label, quality, by_column in zip(labels, qualities, sliced, strict=True)
    )
    return Evaluation(scorer.info, tuple(data), rows, time.perf_counter() - started, tasks)


def _records(columns: Buckets | RocCurve) -> list[dict[str, float | None]]:
    """One mapping a point, e.g. {"false_positive_rate": .., "true_positive_rate": .., "threshold": ..}."""
    names = [name.removesuffix("_K") for name in columns._fields]
    return [{name: finite(float(value)) for name, value in zip(names, row, strict=True)} for row in zip(*columns, strict=True)]
