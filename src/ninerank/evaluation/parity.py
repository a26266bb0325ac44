"""How far scores that were computed again lie from those that were logged, and whether the order changed.

Shape legend: N candidates of a request, T tasks.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

__all__ = ["DECADES", "Parity", "Worst"]

DECADES = tuple(10.0**e for e in range(-9, 1))
NUM_BINS = len(DECADES) + 1
# Upper bounds of fine bins, an eighth of an octave each: a quantile is told to within 9% of itself.
FINE = np.concatenate([[0.0], 2.0 ** (np.arange(-40 * 8, 1) / 8)])

COUNTS = (
    *("num_requests", "num_candidates", "num_scores", "num_flipped", "num_top_flipped", "num_reordered", "num_top_changed"),
    "_sum",
)


@dataclass(frozen=True)
class Worst:
    """The candidate whose score moved most. index: its place in the request. task: its place among the model's tasks."""

    request_id: str
    index: int
    task: int
    logged: float
    again: float


class Parity:
    """Counts what differs, request by request; merges over shards.

    num_flipped: candidates whose rank in their request changed; num_top_flipped: those of them that were among the first `top_k`.
    num_reordered, num_top_changed: requests whose order, or best candidate, changed. Ranks are by the first task, ties by index, as
    the server orders.
    """

    def __init__(self, top_k: int = 10) -> None:
        self.top_k = top_k
        self.num_requests = self.num_candidates = self.num_scores = 0
        self.num_flipped = self.num_top_flipped = self.num_reordered = self.num_top_changed = 0
        self.largest = 0.0
        self.worst: Worst | None = None
        self._sum = 0.0
        self._bins = np.zeros(NUM_BINS, np.int64)
        self._fine = np.zeros(len(FINE) + 1, np.int64)

    def update(self, request_id: str, logged_NT: npt.NDArray[np.float32], again_NT: npt.NDArray[np.float32]) -> Self:
        """Compare one request. A score that is not a number is infinitely far from any other."""
        with np.errstate(invalid="ignore"):
            difference_NT = np.abs(again_NT.astype(np.float64) - logged_NT)
        difference_NT[np.isnan(difference_NT)] = math.inf
        self.num_requests += 1
        self.num_candidates += len(logged_NT)
        self.num_scores += difference_NT.size
        if difference_NT.size == 0:
            return self
        self._sum += float(difference_NT.sum())
        self._bins += np.bincount(np.searchsorted(DECADES, difference_NT.ravel()), minlength=NUM_BINS)
        self._fine += np.bincount(np.searchsorted(FINE, difference_NT.ravel()), minlength=len(self._fine))
        largest = float(difference_NT.max())
        if self.worst is None or largest > self.largest:
            index, task = np.unravel_index(int(difference_NT.argmax()), difference_NT.shape)
            self.largest = largest
            self.worst = Worst(request_id, int(index), int(task), float(logged_NT[index, task]), float(again_NT[index, task]))
        before, after = (np.argsort(-scores_NT[:, 0], kind="stable") for scores_NT in (logged_NT, again_NT))
        rank_before, rank_after = np.argsort(before), np.argsort(after)
        flipped_N = rank_before != rank_after
        flipped = int(flipped_N.sum())
        self.num_flipped += flipped
        self.num_top_flipped += int(flipped_N[before[: self.top_k]].sum())
        self.num_reordered += flipped > 0
        self.num_top_changed += bool(before[0] != after[0])
        return self

    def merge(self, other: Self) -> Self:
        if self.worst is None or other.largest > self.largest:
            self.worst, self.largest = other.worst, other.largest
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._bins = self._bins + other._bins
        self._fine = self._fine + other._fine
        return self

    @property
    def mean(self) -> float:
        return self._sum / self.num_scores if self.num_scores else 0.0

    def quantile(self, share: float) -> float:
        """Difference that this share of the scores does not exceed, rounded up by at most 9%, and never above the largest."""
        if not self.num_scores:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self._fine), math.ceil(share * self.num_scores)))
        return min(self.largest, float(FINE[place])) if place < len(FINE) else self.largest

    def within(self, tolerance: float) -> bool:
        """Whether no score moved by more than `tolerance`."""
        return self.largest <= tolerance

    def histogram(self) -> list[tuple[str, int]]:
        """Scores by size of their difference: "<= 1e-09", ..., from the smallest decade to the largest that is there."""
        last = int(np.flatnonzero(self._bins).max(initial=0))
        names = [f"≤ {decade:.0e}".replace("e-0", "e-").replace("1e+00", "1") for decade in DECADES] + ["not a number"]
        return list(zip(names[: last + 1], self._bins[: last + 1].tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; an infinite difference is null."""
        return {
            "requests": self.num_requests,
            "candidates": self.num_candidates,
            "largest_difference": self.largest if math.isfinite(self.largest) else None,
            "p999_difference": _finite(self.quantile(0.999)),
            "mean_difference": self.mean if math.isfinite(self.mean) else None,
            "worst": None if self.worst is None else {key: _finite(value) for key, value in vars(self.worst).items()},
            "flipped_candidates": self.num_flipped,
            "top_k": self.top_k,
            "top_flipped_candidates": self.num_top_flipped,
            "reordered_requests": self.num_reordered,
            "top_changed_requests": self.num_top_changed,
            "differences": dict(self.histogram()),
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
