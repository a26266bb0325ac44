"""A rank request in process: the user's row, the candidates' rows, and what is checked before a model sees them.

Shape legend: N candidates, T tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import DataError, RequestError, nearest
from ninerank.features.columns import arrow_schema, conform
from ninerank.features.spec import FeatureSpec, Side

__all__ = ["MAX_CANDIDATES", "RankInput", "RankOutput", "RequestSchema", "StageTimes", "check_num_candidates", "named", "record_batch"]

MAX_CANDIDATES = 10_000
MAX_SHOWN_NAME = 100


@dataclass(frozen=True)
class RankInput:
    """One user and the candidates to rank, as the spec's columns.

    user: one row of the request-level columns. items: N rows of the item columns. A missing value takes the feature's default.
    """

    user: pa.RecordBatch
    items: pa.RecordBatch


@dataclass(frozen=True)
class StageTimes:
    """Microseconds: raw values to ids, embedding rows, dense graph."""

    transform_us: int
    lookup_us: int
    compute_us: int


@dataclass(frozen=True)
class RankOutput:
    """scores_NT: float32 probabilities. order: candidate indices by the first task's score, best first, ties by index."""

    scores_NT: npt.NDArray[np.float32]
    order: npt.NDArray[np.int64]
    times: StageTimes


@dataclass(frozen=True)
class RequestSchema:
    """The columns that a spec reads, with the one Arrow type each has in a request, a log and a golden file."""

    request: pa.Schema
    item: pa.Schema

    @cached_property
    def _sides(self) -> dict[Side, tuple[pa.Schema, list[tuple[str, pa.DataType]]]]:
        # Arrow makes a list of names or types anew each time it is asked, which a request would feel.
        sides: tuple[tuple[Side, pa.Schema], ...] = (("request", self.request), ("item", self.item))
        return {side: (schema, list(zip(schema.names, schema.types, strict=True))) for side, schema in sides}

    @classmethod
    def of(cls, spec: FeatureSpec) -> "RequestSchema":
        """Schema of `spec`: ids are string or int64, numbers float64, bags and sequences lists."""
        return cls(arrow_schema(spec, "request"), arrow_schema(spec, "item"))

    def side(self, side: Side) -> pa.Schema:
        """Columns of one side."""
        return self.request if side == "request" else self.item

    def conform(self, side: Side, columns: Mapping[str, pa.Array], num_rows: int) -> tuple[pa.RecordBatch, tuple[str, ...]]:
        """The side's columns in the schema's order and types, and the names of those that were left out.

        Raises RequestError for a column that the spec does not read on this side, or of another length or type.
        """
        schema, types = self._sides[side]
        arrays, missing = [], []
        for name, dtype in types:
            array = columns.get(name)
            if array is None:
                missing.append(name)
                array = pa.nulls(num_rows, dtype)
            elif len(array) != num_rows:
                raise RequestError(f"feature {name!r} has {len(array)} rows, {num_rows} are needed")
            elif array.type != dtype:
                array = _cast(name, array, dtype)
            arrays.append(array)
        if len(arrays) - len(missing) != len(columns):
            for name in columns:
                self.check_name(side, name)
        return record_batch(arrays, schema, num_rows), tuple(missing)

    def rank_input(self, user: pa.RecordBatch, items: pa.RecordBatch, max_candidates: int = MAX_CANDIDATES) -> RankInput:
        """RankInput of columns in any order; those left out take the feature's default. Raises RequestError."""
        check_num_candidates(items.num_rows, max_candidates)
        if user.num_rows != 1:
            raise RequestError(f"a request has one user row, this one has {user.num_rows}")
        return RankInput(self.conform("request", named(user), 1)[0], self.conform("item", named(items), items.num_rows)[0])

    def joined(self, rank_input: RankInput) -> pa.RecordBatch:
        """N rows as a training log has them: the user's columns repeated beside the candidates'."""
        zeros = pa.array(np.zeros(rank_input.items.num_rows, np.int64))
        return pa.RecordBatch.from_pydict(named(rank_input.user.take(zeros)) | named(rank_input.items))

    def check_name(self, side: Side, name: str) -> None:
        """Raise RequestError, with the nearest name, unless `name` is a column of that side."""
        schema, other = (self.request, self.item) if side == "request" else (self.item, self.request)
        if schema.get_field_index(name) >= 0:
            return
        shown = name if len(name) <= MAX_SHOWN_NAME else name[:MAX_SHOWN_NAME] + "..."
        if other.get_field_index(name) >= 0:
            raise RequestError(f"feature {shown!r} is {'a user or context' if side == 'item' else 'an item'} feature, send it on that side")
        raise RequestError(f"unknown {'item' if side == 'item' else 'user'} feature {shown!r}; {nearest(shown, schema.names)}")


def check_num_candidates(count: int, limit: int) -> None:
    """Raise RequestError unless 1 <= count <= limit."""
    if not 1 <= count <= limit:
        raise RequestError(f"a request needs 1 to {limit} candidates, this one has {count}")


def record_batch(arrays: Sequence[pa.Array], schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    """RecordBatch that has its `num_rows` even where a side of the spec has no columns."""
    if arrays:
        return pa.RecordBatch.from_arrays(arrays, schema=schema)
    return pa.RecordBatch.from_struct_array(pa.array([{}] * num_rows, pa.struct([])))


def named(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """Columns by name; raises RequestError for a name that is there twice."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    if len(columns) != batch.num_columns:
        twice = next(name for name in columns if batch.schema.names.count(name) > 1)
        raise RequestError(f"feature {twice!r} is sent twice")
    return columns


def _cast(name: str, array: pa.Array, dtype: pa.DataType) -> pa.Array:
    try:
        # A column without a single value comes without a type that anybody could tell.
        return pa.nulls(len(array), dtype) if array.null_count == len(array) else conform(array, dtype, name)
    except (DataError, pa.ArrowInvalid) as error:
        raise RequestError(str(error)) from None
