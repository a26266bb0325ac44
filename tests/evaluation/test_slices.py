"""Slices over any split of the rows, values of every kind, and what cannot be sliced."""

import numpy as np
import pyarrow as pa
import pytest

from ninerank.errors import DataError
from ninerank.evaluation.slices import MISSING, OTHER, Slices

Columns = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def scored() -> Columns:
    rng = np.random.default_rng(1)
    score = rng.random(600).astype(np.float32)
    return (rng.random(600) < score).astype(np.int64), score


def test_heaviest_values_are_shown_and_the_rest_joined(scored: Columns) -> None:
    label, score = scored
    values = ["a"] * 300 + ["b"] * 200 + ["c"] * 50 + ["d"] * 30 + [None] * 20
    found = Slices("x", max_values=2).update(pa.array(values), label, score).value()
    assert {name: own.rows for name, own in found.items()} == {"a": 300, "b": 200, OTHER: 80, MISSING: 20}
    weight = np.where(np.arange(600) < 550, 1.0, 100.0)
    by_weight = Slices("x", max_values=2).update(pa.array(values), label, score, weight).value()
    assert list(by_weight) == ["d", "a", OTHER, MISSING]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["x", "y", None] * 200),
        pa.array(["x", "y", None] * 200).dictionary_encode(),
        pa.array([1, 2, None] * 200),
        pa.array([True, False, None] * 200),
        pa.array([0.5, 1.5, float("nan")] * 200),
    ],
    ids=["string", "dictionary", "int64", "bool", "float"],
)
def test_merged_parts_equal_the_whole(scored: Columns, values: pa.Array) -> None:
    label, score = scored
    group = np.arange(600) % 7
    whole = Slices("x").update(values, label, score, None, group).value()
    parts = [
        Slices("x").update(values[own], label[own], score[own], None, group[own]) for own in (slice(1), slice(1, 250), slice(250, None))
    ]
    merged = parts[2].merge(parts[0]).merge(parts[1]).value()
    assert len(whole) == 3
    assert merged[MISSING].rows == whole[MISSING].rows == 200
    assert {name: own.as_dict() for name, own in merged.items()} == {name: pytest.approx(own.as_dict()) for name, own in whole.items()}


def test_numbers_that_are_all_shown_come_in_order(scored: Columns) -> None:
    values = pa.array([10] * 300 + [9] * 200 + [-1] * 99 + [None])
    assert list(Slices("x").update(values, *scored).value()) == ["-1", "9", "10", MISSING]


def test_many_floats_become_ranges_of_equal_mass(scored: Columns) -> None:
    label, score = scored
    values = pa.array([None if n % 6 == 0 else float(n) for n in range(600)])
    found = Slices("x").update(values, label, score).value()
    assert len(found) == 11
    assert found.pop(MISSING).rows == 100
    assert {own.rows for own in found.values()} == {50}
    assert next(iter(found)) == "1 to 59"


def test_a_value_called_other_keeps_its_rows(scored: Columns) -> None:
    values = pa.array([OTHER] * 300 + ["a"] * 200 + ["b"] * 100)
    found = Slices("x", max_values=2).update(values, *scored).value()
    assert {name: own.rows for name, own in found.items()} == {OTHER: 300, "a": 200, f"{OTHER}*": 100}


def test_many_whole_numbers_stay_values(scored: Columns) -> None:
    found = Slices("x", max_values=3).update(pa.array(range(600)), *scored).value()
    assert [own.rows for own in found.values()] == [1, 1, 1, 597]


def test_lists_are_no_slices(scored: Columns) -> None:
    with pytest.raises(DataError, match=r"slice 'x': the column is of type list<.*> *, one value per row"):
        Slices("x").update(pa.array([[1]] * 600), *scored)


def test_without_rows_there_are_no_slices() -> None:
    assert Slices("x").value() == {}
    assert Slices("x").update(pa.array([], pa.string()), [], []).value() == {}
