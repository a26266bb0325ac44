"""Several tasks over the same impressions, and conversion measured over the space it is used in (ESMM).

Shape legend: B rows of one update, T tasks.
"""

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.accumulator import Accumulator, State, under
from ninerank.metrics.calibration import PCOC
from ninerank.metrics.likelihood import LogLoss
from ninerank.metrics.ranking import AUC
from ninerank.metrics.rows import Array, check_rows

__all__ = ["Conversion", "ConversionTable", "PerTask", "TaskQuality"]

Metric = TypeVar("Metric", bound=Accumulator)


class PerTask(Generic[Metric]):
    """One metric for each task, over the rows where the task has a label (a label of nan is none).

    make: makes the metric of one task. Raises DataError where columns and tasks do not match.

    >>> two = PerTask(AUC, ["click", "buy"])
    >>> _ = two.update([[0, np.nan], [1, 0], [1, 1]], [[0.1, 0.5], [0.9, 0.2], [0.5, 0.3]])
    >>> two.value()
    {'click': 1.0, 'buy': 1.0}
    """

    def __init__(self, make: Callable[[], Metric], tasks: list[str]) -> None:
        self.metrics = {task: make() for task in tasks}

    def update(self, label_BT: ArrayLike, score_BT: ArrayLike, weight_B: ArrayLike | None = None, **columns_B: ArrayLike) -> Self:
        """columns_B: what else the metric takes for each row, group_B for instance."""
        labels, scores = np.asarray(label_BT, np.float64), np.asarray(score_BT)
        shape = (len(labels), len(self.metrics))
        if labels.shape != shape or scores.shape != shape:
            raise DataError(f"labels {labels.shape} and scores {scores.shape} of tasks {', '.join(self.metrics)}: {shape} is needed")
        others = {name: np.asarray(column) for name, column in columns_B.items()}
        if weight_B is not None:
            others["weight_B"] = np.asarray(weight_B)
        for t, metric in enumerate(self.metrics.values()):
            own = ~np.isnan(labels[:, t])
            metric.update(labels[own, t], scores[own, t], **{name: column[own] for name, column in others.items()})  # type: ignore[attr-defined]
        return self

    def merge(self, other: Self) -> Self:
        if list(self.metrics) != list(other.metrics):
            raise ValueError(f"tasks {', '.join(other.metrics)} do not merge with {', '.join(self.metrics)}")
        for task, metric in self.metrics.items():
            metric.merge(other.metrics[task])
        return self

    def value(self) -> dict[str, float]:
        return {task: metric.value() for task, metric in self.metrics.items()}  # type: ignore[attr-defined]

    def state(self) -> State:
        """The states of the tasks' metrics, each column under the name of its task."""
        return {f"{task}/{key}": column for task, metric in self.metrics.items() for key, column in metric.state().items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Array], make: Callable[[], Metric]) -> Self:
        """The metrics whose `state()` this is; `make` makes one of them, which tells their kind."""
        found = cls(make, list(dict.fromkeys(key.rpartition("/")[0] for key in state)))
        for task in found.metrics:
            found.metrics[task] = type(make()).from_state(under(state, f"{task}/"))
        return found


class TaskQuality(NamedTuple):
    """rows: those the task was measured on. auc, logloss, pcoc: nan where there is no value."""

    rows: int
    auc: float
    logloss: float
    pcoc: float


class ConversionTable(NamedTuple):
    """click: pCTR over all impressions. conversion: pCVR over the clicked ones. both: pCTCVR = pCTR * pCVR over all impressions."""

    click: TaskQuality
    conversion: TaskQuality
    both: TaskQuality


class Conversion(Accumulator):
    """Click, conversion after a click, and click and conversion, each over the impressions that can tell (ESMM).

    Ma et al. 2018, "Entire Space Multi-Task Model": p(click and conversion | shown) = p(click | shown) p(conversion | click).
    pCVR can only be judged on clicks, where conversions are seen; pCTCVR on all impressions, which is where it ranks.
    Raises DataError for rows that `check_rows` refuses, and for a conversion without a click.

    >>> found = Conversion().update([1, 1, 0], [1, 0, 0], [0.8, 0.6, 0.1], [0.5, 0.1, 0.9]).value()
    >>> found.click.auc, found.conversion.rows, found.both.auc
    (1.0, 2, 1.0)
    """

    def __init__(self) -> None:
        self._rows = np.zeros(2, np.int64)
        self._parts = [(AUC(), LogLoss(), PCOC()) for _ in ConversionTable._fields]

    def update(
        self, click_B: ArrayLike, converted_B: ArrayLike, ctr_B: ArrayLike, cvr_B: ArrayLike, weight_B: ArrayLike | None = None
    ) -> Self:
        """click_B, converted_B: 0 or 1. ctr_B: p(click). cvr_B: p(conversion | click)."""
        clicks, conversions = (
            check_rows(click_B, ctr_B, weight_B, probability=True),
            check_rows(converted_B, cvr_B, weight_B, probability=True),
        )
        if len(clicks) != len(conversions):
            raise DataError(f"{len(conversions)} conversions for {len(clicks)} clicks: one of each per row is needed")
        wrong = conversions.label_B & ~clicks.label_B
        if wrong.any():
            raise DataError(
                f"row {int(wrong.argmax())} has a conversion and no click ({int(wrong.sum())} such rows): a conversion follows a click"
            )
        own, weight_B = clicks.label_B, clicks.weight_B
        both_B = clicks.score_B.astype(np.float64) * conversions.score_B
        for metrics, (label, score, weight) in zip(
            self._parts,
            (
                (clicks.label_B, clicks.score_B, weight_B),
                (conversions.label_B[own], conversions.score_B[own], None if weight_B is None else weight_B[own]),
                (conversions.label_B, both_B, weight_B),
            ),
            strict=True,
        ):
            for metric in metrics:
                metric.update(label, score, weight)
        self._rows += [len(clicks), int(own.sum())]
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._rows = self._rows + other._rows
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine[0].merge(theirs[0])
            mine[1].merge(theirs[1])
            mine[2].merge(theirs[2])
        return self

    def value(self) -> ConversionTable:
        shown, clicked = self._rows.tolist()
        return ConversionTable(
            *(
                TaskQuality(rows, *(metric.value() for metric in metrics))
                for rows, metrics in zip((shown, clicked, shown), self._parts, strict=True)
            )
        )

    def state(self) -> State:
        found = {"rows": self._rows.copy()}
        for name, metrics in zip(ConversionTable._fields, self._parts, strict=True):
            for metric in metrics:
                found |= {f"{name}.{type(metric).__name__}.{key}": column for key, column in metric.state().items()}
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls()
        metric._rows = np.array(state["rows"], np.int64)
        metric._parts = [
            (
                AUC.from_state(under(state, f"{name}.AUC.")),
                LogLoss.from_state(under(state, f"{name}.LogLoss.")),
                PCOC.from_state(under(state, f"{name}.PCOC.")),
            )
            for name in ConversionTable._fields
        ]
        return metric
