"""Quality by slice: the rows of each value, or range of values, of one column.

Shape legend: B rows of one update, N rows in all.
"""

from collections.abc import Hashable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.evaluation.quality import Quality, Summary
from ninerank.metrics.rows import Array

__all__ = ["MISSING", "OTHER", "ColumnCodes", "Slices"]

MISSING, OTHER = "(missing)", "(other)"
NUM_RANGES = 10


class ColumnCodes:
    """Values of one column as numbers, and the slices that they fall into: see `Slices`."""

    def __init__(self, column: str, max_values: int = 25) -> None:
        self.column, self.max_values = column, max_values
        self._codes: dict[Hashable, int] = {}
        self._is_float = False

    def encode(self, values: pa.Array) -> Array:
        """int32 (B,): number of each value, -1 for null and nan. Raises DataError for a column of lists or structs."""
        if pa.types.is_nested(values.type):
            raise DataError(f"slice {self.column!r}: the column is of type {values.type}, one value per row is needed")
        self._is_float = self._is_float or pa.types.is_floating(values.type)
        encoded = values if pa.types.is_dictionary(values.type) else pc.dictionary_encode(values)
        own = [self._code(value) for value in encoded.dictionary.to_pylist()]
        index_B = encoded.indices.fill_null(len(own)).to_numpy(zero_copy_only=False)
        codes: Array = np.array([*own, -1], np.int32)[index_B]
        return codes

    def merge(self, other: Self) -> Array:
        """Take in the values of `other`, a coding of the same column; returns the new number of each of its numbers, -1 last."""
        into = np.array([*(self._codes.setdefault(value, len(self._codes)) for value in other._codes), -1], np.int32)
        self._is_float = self._is_float or other._is_float
        return into

    def _code(self, value: Hashable) -> int:
        is_missing = value is None or value != value  # noqa: PLR0124
        return -1 if is_missing else self._codes.setdefault(value, len(self._codes))

    def places(self, code_N: Array, weight_N: Array | None) -> tuple[list[str], Array]:
        """Names of the slices in the order in which they are shown, and each row's place among them."""
        values = list(self._codes)
        mass = np.bincount(code_N + 1, weight_N, len(values) + 1)[1:]
        if self._is_float and len(values) > self.max_values:
            names, place = _ranges(np.array(values, np.float64), mass)
        else:
            heaviest = np.argsort(-mass, kind="stable")[: self.max_values]
            if len(values) <= self.max_values and all(isinstance(value, int | float) for value in values):
                heaviest = np.argsort(np.array(values), kind="stable")
            names, place = [_show(values[code]) for code in heaviest], np.full(len(values), len(heaviest))
            place[heaviest] = np.arange(len(heaviest))
        return [*names, OTHER, MISSING], np.append(place, len(names) + 1)[code_N]


class Slices:
    """Rows by the values of one column: the `max_values` heaviest, the rest as "(other)", nulls and nans as "(missing)".

    Numbers that are all shown come in ascending order. A column of floats with more than `max_values` values is cut into
    10 ranges of equal mass instead. Raises DataError for a column of lists or structs.
    """

    def __init__(self, column: str, max_values: int = 25) -> None:
        self._codes = ColumnCodes(column, max_values)
        self._chunks: list[dict[str, Array]] = []

    def update(
        self, values: pa.Array, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None, group_B: ArrayLike | None = None
    ) -> Self:
        chunk = {"code": self._codes.encode(values), "label": np.asarray(label_B) == 1, "score": np.asarray(score_B)}
        if weight_B is not None:
            chunk["weight"] = np.asarray(weight_B, np.float64)
        if group_B is not None:
            chunk["group"] = np.asarray(group_B)
        self._chunks.append(chunk)
        return self

    def merge(self, other: Self) -> Self:
        """Take in the rows of `other`, a slicing of the same column."""
        into = self._codes.merge(other._codes)
        self._chunks.extend({**chunk, "code": into[chunk["code"]]} for chunk in other._chunks)
        return self

    def value(self) -> dict[str, Summary]:
        """Metrics of each slice, heaviest first ((other) and (missing) last), or by ascending number or range."""
        if not self._chunks:
            return {}
        code_N, weight_N = self._column("code"), self._column("weight")
        columns = [self._column("label"), self._column("score"), weight_N, self._column("group")]
        assert code_N is not None
        names, place_N = self._codes.places(code_N, weight_N)
        order = np.argsort(place_N, kind="stable")
        ends = np.searchsorted(place_N[order], np.arange(len(names) + 1))
        found: dict[str, Summary] = {}
        for name, start, end in zip(names, ends[:-1], ends[1:], strict=True):
            own = order[start:end]
            if len(own):
                label, score, weight, group = (None if column is None else column[own] for column in columns)
                assert label is not None
                assert score is not None
                # A value may be called as a range or "(other)" is.
                found[name if name not in found else f"{name}*"] = Quality().update(label, score, weight, group).summary()
        return found

    def _column(self, name: str) -> Array | None:
        """All chunks of a column; None for weights or groups that are not there."""
        if name not in self._chunks[0]:
            return None
        return np.concatenate([chunk[name] for chunk in self._chunks])


def _ranges(values: Array, mass: Array) -> tuple[list[str], Array]:
    order = np.argsort(values)
    middle = np.cumsum(mass[order]) - mass[order] / 2
    part = np.minimum((middle / (mass.sum() or 1.0) * NUM_RANGES).astype(np.int64), NUM_RANGES - 1)
    parts = np.unique(part, return_inverse=True)[1]
    place = np.empty(len(values), np.int64)
    place[order] = parts
    ends = np.flatnonzero(np.append(parts[1:] != parts[:-1], True))
    starts = np.append(0, ends[:-1] + 1)
    return [f"{values[order[a]]:.4g} to {values[order[b]]:.4g}" for a, b in zip(starts, ends, strict=True)], place


def _show(value: Hashable) -> str:
    text = str(value)
    return '""' if text == "" else text
