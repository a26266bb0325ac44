"""A request log scored again, compared, and measured against labels: `ninerank replay`.

Shape legend: N candidates of a request, T tasks.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from ninerank.errors import DataError
from ninerank.evaluation.joined import JoinStats, Labels
from ninerank.evaluation.parity import Parity
from ninerank.evaluation.quality import Quality
from ninerank.evaluation.replayer import Replayer

if TYPE_CHECKING:
    from ninerank.predictor.requestlog import LoggedRequest

__all__ = ["Replay", "count_requests", "replay"]

Unlabelled = Literal["skip", "zero"]
ROWS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    source, kind, spec_digest, device: of the replayer. served, answered: requests by (model name, version), when logged and now.
    logged, again: quality of the logged scores and of the new ones by task, empty without labels; GAUC is by request.
    """

    log: str
    source: str
    kind: str
    spec_digest: str | None
    device: str | None
    seconds: float
    tolerance: float
    parity: Parity
    served: dict[tuple[str, str], int]
    answered: dict[tuple[str, str], int]
    logged: dict[str, Quality]
    again: dict[str, Quality]
    joined: JoinStats | None

    @property
    def passed(self) -> bool:
        return self.parity.within(self.tolerance)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": self.passed,
            "tolerance": self.tolerance,
            **self.parity.as_dict(),
            "log": self.log,
            "source": self.source,
            "kind": self.kind,
            "spec_digest": self.spec_digest,
            "device": self.device,
            "served": _models(self.served),
            "answered": _models(self.answered),
            "seconds": round(self.seconds, 3),
            "requests_per_s": round(self.parity.num_requests / self.seconds, 1),
            "labels": None if self.joined is None else self.joined.as_dict(),
            "quality": {
                task: {"logged": self.logged[task].summary().as_dict(), "again": self.again[task].summary().as_dict()}
                for task in self.again
            },
        }


def replay(
    requests: Iterable["LoggedRequest"],
    replayer: Replayer,
    *,
    log: str = "",
    labels: Labels | None = None,
    unlabelled: Unlabelled = "skip",
    tolerance: float = 1e-6,
    on_requests: Callable[[int], None] = lambda _: None,
) -> Replay:
    """Score every request again and compare; with labels also measure both, old scores and new ones.

    unlabelled: candidates without a label are left out, or count as 0 (where only clicks are recorded).
    Raises DataError for an empty log, another spec, or another number of scores; and what the replayer raises.
    """
    started = time.perf_counter()
    parity, served, answered = Parity(), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    logged, again = _Measured(), _Measured()
    for request in requests:
        answer = replayer.rank(request)
        if answer.scores_NT.shape != request.scores_NT.shape:
            shapes = f"{answer.scores_NT.shape} now, {request.scores_NT.shape} when it was served (candidates, tasks)"
            raise DataError(f"request {request.request_id!r} has scores of shape {shapes}")
        parity.update(request.request_id, request.scores_NT, answer.scores_NT)
        served[request.model_name, request.model_version] += 1
        answered[answer.model_name, answer.model_version] += 1
        if labels is not None:
            label_NT = labels.take(request.request_id, request.candidate_ids, len(answer.scores_NT))
            if label_NT.shape[1] > answer.scores_NT.shape[1]:
                raise DataError(f"there are labels of {label_NT.shape[1]} tasks, the model has {answer.scores_NT.shape[1]}")
            if unlabelled == "zero":
                label_NT = np.nan_to_num(label_NT)
            logged.update(label_NT, request.scores_NT, parity.num_requests)
            again.update(label_NT, answer.scores_NT, parity.num_requests)
        on_requests(1)
    if parity.num_requests == 0:
        raise DataError(f"{log or 'the log'}: holds no requests")
    if labels is not None and labels.stats.labelled == 0:
        raise DataError(
            f"none of the {labels.stats.rows} labels met a request of {log or 'the log'}; are request and candidate ids the same?"
        )
    by_task = [{} if labels is None else measured.by_task(labels.tasks) for measured in (logged, again)]
    seconds = time.perf_counter() - started
    joined = None if labels is None else labels.stats
    return Replay(
        log=log,
        source=replayer.source,
        kind=replayer.kind,
        spec_digest=replayer.spec_digest,
        device=replayer.device,
        seconds=seconds,
        tolerance=tolerance,
        parity=parity,
        served=dict(served),
        answered=dict(answered),
        logged=by_task[0],
        again=by_task[1],
        joined=joined,
    )


def count_requests(log: str | Path) -> int | None:
    """Requests of a log file or directory as their footers tell; None if one cannot be read (reading them will say why)."""
    root = Path(log)
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    try:
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    except (OSError, ValueError):
        return None


def _models(counts: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    return [{"model_name": name, "model_version": version, "requests": count} for (name, version), count in counts.items()]


class _Measured:
    """Quality by task, of requests that come one by one: they are measured many at a time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[npt.NDArray[Any], ...]] = []
        self._num_waiting = 0
        self._qualities: list[Quality] = []

    def update(self, label_NT: npt.NDArray[np.float64], scores_NT: npt.NDArray[np.float32], group: int) -> None:
        """Rows without a label (nan) are left out."""
        known_N = np.isfinite(label_NT[:, 0])
        self._waiting.append((label_NT[known_N], scores_NT[known_N], np.full(int(known_N.sum()), group)))
        self._num_waiting += len(label_NT)
        if self._num_waiting >= ROWS_AT_A_TIME:
            self._flush()

    def by_task(self, tasks: Sequence[str]) -> dict[str, Quality]:
        self._flush()
        return dict(zip(tasks, self._qualities, strict=True))

    def _flush(self) -> None:
        if not self._waiting:
            return
        label_NT, scores_NT, group_N = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        self._qualities = self._qualities or [Quality() for _ in range(label_NT.shape[1])]
        for task, quality in enumerate(self._qualities):
            quality.update(label_NT[:, task], scores_NT[:, task], None, group_N)
