"""A request log scored again, compared, and measured against labels: `ninerank replay`.

Shape legend: N candidates of a request, T tasks.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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
from ninerank.evaluation.schedule import answered as answered_in_turn
from ninerank.evaluation.skew import Skew

if TYPE_CHECKING:
    from ninerank.predictor.requestlog import LoggedRequest

__all__ = ["Check", "Replay", "count_requests", "replay"]

Unlabelled = Literal["skip", "zero"]
ROWS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Check:
    """One line of the gate: what was found against what is allowed."""

    name: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.found <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """For JSON; an infinite difference is null."""
        found = self.found if math.isfinite(self.found) else None
        return {"name": self.name, "found": found, "allowed": self.allowed, "passed": self.passed}


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    source, kind, spec_digest, device: of the replayer. served, answered: requests by (model name, version), when logged and now.
    logged, again: quality of the logged scores and of the new ones by task, empty without labels; GAUC is by request. skew: logged
    features against a snapshot. max_top_flips: share of candidates whose rank may change among the first; None: any.
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
    skew: Skew | None = None
    max_top_flips: float | None = None

    @property
    def checks(self) -> list[Check]:
        """What a release is gated on, each against its budget."""
        parity, tolerance = self.parity, self.tolerance
        found = [
            Check("largest score difference", parity.largest, tolerance),
            Check("99.9% of score differences", parity.quantile(0.999), tolerance),
        ]
        if self.max_top_flips is not None:
            share = parity.num_top_flipped / max(1, parity.num_candidates)
            found.append(Check(f"rank flips in the top {parity.top_k}, share of candidates", share, self.max_top_flips))
        if self.skew is not None:
            found.append(Check("largest score difference from the snapshot's features", self.skew.parity.largest, tolerance))
            found += [Check(f"{kind} values of {name}", count, 0) for name, kind, count in self.skew.found()]
        return found

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def check(self) -> None:
        """Raise DataError where nothing was replayed, or no label met a request."""
        if self.parity.num_requests == 0:
            raise DataError(f"{self.log or 'the log'}: holds no requests")
        if self.joined is not None and self.joined.labelled == 0:
            log = self.log or "the log"
            raise DataError(f"none of the {self.joined.rows} labels met a request of {log}; are request and candidate ids the same?")

    def merge(self, other: "Replay") -> "Replay":
        """Both shares of one log as one; the time is that of the slower."""
        self.parity.merge(other.parity)
        for mine, theirs in ((self.logged, other.logged), (self.again, other.again)):
            for task, quality in theirs.items():
                mine[task] = mine[task].merge(quality) if task in mine else quality
        if self.skew is not None and other.skew is not None:
            self.skew.merge(other.skew)
        return replace(
            self,
            seconds=max(self.seconds, other.seconds),
            served=dict(Counter(self.served) + Counter(other.served)),
            answered=dict(Counter(self.answered) + Counter(other.answered)),
            joined=None if self.joined is None or other.joined is None else self.joined.merge(other.joined),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": self.passed,
            "checks": [check.as_dict() for check in self.checks],
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
            "skew": None if self.skew is None else self.skew.as_dict(),
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
    skew: Skew | None = None,
    top_k: int = 10,
    max_top_flips: float | None = None,
    concurrency: int = 1,
    shard: tuple[int, int] = (0, 1),
    on_requests: Callable[[int], None] = lambda _: None,
) -> Replay:
    """Score every request again and compare; with labels also measure both, old scores and new ones.

    unlabelled: candidates without a label are left out, or count as 0 (where only clicks are recorded). skew: to hold the logged
    features against snapshots, too. concurrency: requests under way at once. shard: (k, n) where this is one of n shares that merge.
    Raises DataError for an empty log, another spec, or another number of scores; and what the replayer raises.
    """
    started = time.perf_counter()
    parity, served, answered = Parity(top_k), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    logged, again = _Measured(), _Measured()
    share, shares = shard
    for request, answer in answered_in_turn(requests, replayer, concurrency):
        if answer.scores_NT.shape != request.scores_NT.shape:
            shapes = f"{answer.scores_NT.shape} now, {request.scores_NT.shape} when it was served (candidates, tasks)"
            raise DataError(f"request {request.request_id!r} has scores of shape {shapes}")
        parity.update(request.request_id, request.scores_NT, answer.scores_NT)
        served[request.model_name, request.model_version] += 1
        answered[answer.model_name, answer.model_version] += 1
        if skew is not None:
            skew.update(request, lambda features, request=request: replayer.score(request, features))  # type: ignore[misc]
        if labels is not None:
            label_NT = labels.take(request.request_id, request.candidate_ids, len(answer.scores_NT))
            if label_NT.shape[1] > answer.scores_NT.shape[1]:
                raise DataError(f"there are labels of {label_NT.shape[1]} tasks, the model has {answer.scores_NT.shape[1]}")
            if unlabelled == "zero":
                label_NT = np.nan_to_num(label_NT)
            group = parity.num_requests * shares + share
            logged.update(label_NT, request.scores_NT, group)
            again.update(label_NT, answer.scores_NT, group)
        on_requests(1)
    by_task = [{} if labels is None else measured.by_task(labels.tasks) for measured in (logged, again)]
    seconds = time.perf_counter() - started
    joined = None if labels is None else labels.stats
    found = Replay(
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
        skew=skew,
        max_top_flips=max_top_flips,
    )
    if shares == 1:
        found.check()
    return found


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
        return dict(zip(tasks, self._qualities, strict=True)) if self._qualities else {}

    def _flush(self) -> None:
        if not self._waiting:
            return
        label_NT, scores_NT, group_N = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        self._qualities = self._qualities or [Quality() for _ in range(label_NT.shape[1])]
        for task, quality in enumerate(self._qualities):
            quality.update(label_NT[:, task], scores_NT[:, task], None, group_N)
