"""Features as they were served against features as they should have been: which column differs, how often, and what it did to scores.

For every column of every logged request the value that was used is held against the snapshot's as of the request's time:

    shifted     another value
    defaulted   nothing was used where the snapshot has a value (a cache miss, a column left out)
    unexpected  a value was used where the snapshot has none
    future      the value is not that of the time, but one that became valid later: it leaked

Where the snapshot's features give other scores than were served, the columns to blame are found by delta debugging (Zeller and
Hildebrandt, 2002): the smallest set, which no column can leave, that brings the served scores back when it is taken from the log.

Shape legend: N candidates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.evaluation.parity import Parity
from ninerank.evaluation.snapshot import AsOf, Snapshot
from ninerank.features.spec import Side

if TYPE_CHECKING:
    from ninerank.predictor.request import RankInput
    from ninerank.predictor.requestlog import LoggedRequest

__all__ = ["ColumnSkew", "Example", "SideSnapshot", "Skew", "blame"]

Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
KINDS = ("shifted", "defaulted", "unexpected", "future")


@dataclass(frozen=True)
class Example:
    """The first value of a kind. candidate: its index, None on the user's side. valid_from_us: of a value from the future."""

    request_id: str
    candidate: int | None
    logged: str
    expected: str
    valid_from_us: int | None = None


@dataclass
class ColumnSkew:
    """Values of one column: compared, and how many of each kind. blamed: requests whose scores changed because of it."""

    compared: int = 0
    shifted: int = 0
    defaulted: int = 0
    unexpected: int = 0
    future: int = 0
    blamed: int = 0
    examples: dict[str, Example] = field(default_factory=dict)

    @property
    def differing(self) -> int:
        return self.shifted + self.defaulted + self.unexpected + self.future

    def merge(self, other: Self) -> Self:
        for name in ("compared", "blamed", *KINDS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = other.examples | self.examples
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SideSnapshot:
    """A snapshot of one side, looked up by the request's own column of its key, or else, on the item side, by candidate id."""

    side: Side
    snapshot: Snapshot

    @property
    def column(self) -> str:
        return self.snapshot.key


class Skew:
    """Counts skew request by request; merges over shards. parity: served scores against those of the snapshot's features.

    tolerance: score difference above which columns are blamed; most_blamed: requests for which that is done, since it scores each
    several times.
    """

    def __init__(self, sides: Sequence[SideSnapshot], *, tolerance: float, most_blamed: int = 200) -> None:
        self.sides, self.tolerance, self.most_blamed = tuple(sides), tolerance, most_blamed
        self.columns = {name: ColumnSkew() for own in self.sides for name in own.snapshot.columns}
        self.parity = Parity()
        self.num_blamed = self.num_unexplained = self.num_unknown = 0

    @property
    def checks_future(self) -> bool:
        """Whether any snapshot knows times."""
        return any(own.snapshot.time is not None for own in self.sides)

    def found(self) -> list[tuple[str, str, int]]:
        """Column, kind and count of every difference, columns as the snapshots have them."""
        counts = ((name, kind, getattr(own, kind)) for name, own in self.columns.items() for kind in KINDS)
        return [(name, kind, count) for name, kind, count in counts if count]

    def update(self, request: "LoggedRequest", score: "Callable[[RankInput], Scores]") -> Self:
        """Compare one request; score: gives scores_NT of other features of it. Raises what `score` does."""
        expected: dict[str, pa.Array] = {}
        differing: list[str] = []
        for own in self.sides:
            rows = request.input.user if own.side == "request" else request.input.items
            found = own.snapshot.as_of(_ids(request, rows, own), request.time_us)
            self.num_unknown += int((found.row_N < 0).sum())
            for name, array in own.snapshot.features(found).items():
                # An entity that the snapshot does not know says nothing about its features; they stay as they were logged.
                known_N = pa.array(found.row_N >= 0)
                expected[name] = pc.if_else(known_N, array, rows.column(name))
                if self._compare(own, name, request.request_id, rows.column(name), expected[name], found):
                    differing.append(name)
        right = score(_with(request, expected)) if differing else request.scores_NT
        self.parity.update(request.request_id, request.scores_NT, right)
        if not _same(request.scores_NT, right, self.tolerance):
            self._blame(request, expected, differing, score)
        return self

    def merge(self, other: Self) -> Self:
        for name, own in self.columns.items():
            own.merge(other.columns[name])
        self.parity.merge(other.parity)
        for count in ("num_blamed", "num_unexplained", "num_unknown"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checks_future": self.checks_future,
            "unknown_entities": self.num_unknown,
            "columns": {name: own.as_dict() for name, own in self.columns.items()},
            "parity": self.parity.as_dict(),
            "blamed_requests": self.num_blamed,
            "unexplained_requests": self.num_unexplained,
        }

    def _compare(self, own: SideSnapshot, name: str, request_id: str, logged: pa.Array, expected: pa.Array, found: AsOf) -> bool:
        """Count the differences of one column; whether there are any."""
        skew = self.columns[name]
        skew.compared += len(logged)
        differs_N = _differs(logged, expected)
        if not differs_N.any():
            return False
        used_N, wanted_N = _present(logged), _present(expected)
        later_N = np.full(len(logged), -1, np.int64)
        for n in np.flatnonzero(differs_N & used_N & (found.next_N < found.end_N)).tolist():
            later_N[n] = _version_of(logged[n], own.snapshot, name, int(found.next_N[n]), int(found.end_N[n]))
        kinds = {
            "future": later_N >= 0,
            "defaulted": differs_N & ~used_N,
            "unexpected": differs_N & ~wanted_N & (later_N < 0),
            "shifted": differs_N & used_N & wanted_N & (later_N < 0),
        }
        for kind, which_N in kinds.items():
            count = int(which_N.sum())
            setattr(skew, kind, getattr(skew, kind) + count)
            if count and kind not in skew.examples:
                row = int(which_N.argmax())
                since = int(own.snapshot.time_R[later_N[row]]) if kind == "future" else None
                place = row if own.side == "item" else None
                skew.examples[kind] = Example(request_id, place, str(logged[row].as_py()), str(expected[row].as_py()), since)
        return True

    def _blame(
        self,
        request: "LoggedRequest",
        expected: dict[str, pa.Array],
        differing: Sequence[str],
        score: "Callable[[RankInput], Scores]",
    ) -> None:
        if self.num_blamed >= self.most_blamed:
            return
        self.num_blamed += 1

        def explains(kept: Iterable[str]) -> bool:
            """Whether the served scores come back when these columns are as logged."""
            taken = {name: array for name, array in expected.items() if name not in set(kept)}
            return _same(request.scores_NT, score(_with(request, taken)), self.tolerance)

        guilty = blame(tuple(differing), explains)
        self.num_unexplained += not guilty
        for name in guilty:
            self.columns[name].blamed += 1


def blame(columns: Sequence[str], explains: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """A set of columns that explains a difference and of which none can be left out; empty if all together do not.

    >>> blame("abcdefgh", lambda kept: {"b", "g"} <= set(kept))
    ('b', 'g')
    >>> blame("ab", lambda kept: False)
    ()
    """
    left = tuple(columns)
    if not left or not explains(left):
        return ()
    parts = 2
    while len(left) > 1:
        for kept, next_parts in _candidates(left, parts):
            if explains(kept):
                left, parts = kept, next_parts
                break
        else:
            if parts >= len(left):
                break
            parts = min(2 * parts, len(left))
    return left


def _candidates(columns: tuple[str, ...], parts: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """Each of `parts` parts, then all but each; with the number of parts to go on with."""
    bounds = [len(columns) * part // parts for part in range(parts + 1)]
    cuts = list(pairwise(bounds))
    yield from ((columns[low:high], 2) for low, high in cuts)
    if parts > 2:
        yield from ((columns[:low] + columns[high:], parts - 1) for low, high in cuts)


def _ids(request: "LoggedRequest", rows: pa.RecordBatch, own: SideSnapshot) -> pa.Array:
    if own.column in rows.schema.names:
        return rows.column(own.column)
    if own.side == "item" and request.candidate_ids is not None:
        return request.candidate_ids
    raise DataError(
        f"request {request.request_id!r} was logged without candidate ids, and {own.column!r} is no {own.side} feature: "
        f"{own.snapshot.path} cannot be looked up"
    )


def _with(request: "LoggedRequest", columns: dict[str, pa.Array]) -> "RankInput":
    """The request's features with some columns replaced."""

    def replaced(rows: pa.RecordBatch) -> pa.RecordBatch:
        if not rows.num_columns:
            return rows
        arrays = [columns.get(name, rows.column(name)) for name in rows.schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=rows.schema)

    from ninerank.predictor.request import RankInput

    return RankInput(replaced(request.input.user), replaced(request.input.items))


def _differs(one: pa.Array, other: pa.Array) -> Mask:
    """Which values are not the same; null is the same as null and as an empty list, both of which take the default."""
    if pa.types.is_list(one.type):
        return np.array([(a or []) != (b or []) for a, b in zip(one.to_pylist(), other.to_pylist(), strict=True)], np.bool_)
    unequal: Mask = pc.fill_null(pc.not_equal(one, other), False).to_numpy(zero_copy_only=False)
    differs: Mask = unequal | (_present(one) != _present(other))
    return differs


def _present(array: pa.Array) -> Mask:
    """Which values are there: not null, and no empty list."""
    there = pc.fill_null(pc.greater(pc.list_value_length(array), 0), False) if pa.types.is_list(array.type) else array.is_valid()
    present: Mask = there.to_numpy(zero_copy_only=False)
    return present


def _version_of(value: pa.Scalar, snapshot: Snapshot, column: str, low: int, high: int) -> int:
    """First version in low .. high - 1 that has this value; -1 if none has."""
    versions = snapshot.take(column, np.arange(low, high)).to_pylist()
    wanted = value.as_py()
    return next((low + n for n, version in enumerate(versions) if version == wanted), -1)


def _same(one: Scores, other: Scores, tolerance: float) -> bool:
    return bool(np.abs(one.astype(np.float64) - other).max(initial=0.0) <= tolerance)
