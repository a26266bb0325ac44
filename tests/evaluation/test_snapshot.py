"""Versions of features as of a time, against a plain loop, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.evaluation.snapshot import Snapshot

SCHEMA = pa.schema({"item": pa.string(), "price": pa.float64(), "tags": pa.list_(pa.string())})


def written(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@given(
    versions=st.lists(st.tuples(st.integers(0, 4), st.integers(-5, 5)), unique=True, max_size=20),
    asked=st.lists(st.integers(0, 6), max_size=8),
    time=st.integers(-7, 7),
)
def test_as_of_is_the_last_version_that_is_not_later(
    versions: list[tuple[int, int]], asked: list[int], time: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("snapshot") / "items.parquet"
    rows = [{"id": f"i{key}", "at": at, "price": 100.0 * key + at} for key, at in versions]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema({"id": pa.string(), "at": pa.int64(), "price": pa.float64()})), path)
    snapshot = Snapshot(path, SCHEMA, key="id", time="at")
    found = snapshot.as_of(pa.array([f"i{key}" for key in asked], pa.string()), time)
    for key, price, next_, end in zip(asked, snapshot.take("price", found.row_N).to_pylist(), found.next_N, found.end_N, strict=True):
        before = [at for other, at in versions if other == key and at <= time]
        assert price == (100.0 * key + max(before) if before else None)
        later = sorted(at for other, at in versions if other == key and at > time)
        assert snapshot.time_R[next_:end].tolist() == later


def test_timestamps_and_integer_ids_are_taken(tmp_path: Path) -> None:
    times = pa.array([1, 2], pa.timestamp("s", "UTC"))
    path = written(tmp_path / "items.parquet", id=pa.array([7, 7]), at=times, price=pa.array([1, 2]))
    snapshot = Snapshot(path, SCHEMA, key="id", time="at")
    for time_us, price in ((999_999, None), (1_000_000, 1.0), (1_999_999, 1.0), (2_000_000, 2.0)):
        found = snapshot.as_of(pa.array([7]), time_us)
        assert snapshot.take("price", found.row_N).to_pylist() == [price]


def test_without_a_time_every_row_is_valid_always(tmp_path: Path) -> None:
    snapshot = Snapshot(written(tmp_path / "i.parquet", id=["a", "b"], tags=[["x"], None]), SCHEMA, key="id")
    found = snapshot.as_of(pa.array(["b", "a", "c"]), 0)
    assert snapshot.columns == ("tags",)
    assert snapshot.take("tags", found.row_N).to_pylist() == [None, ["x"], None]
    assert np.array_equal(found.next_N, found.end_N)


@pytest.mark.parametrize(
    ("columns", "key", "time", "said"),
    [
        ({"idd": ["a"], "price": [1.0]}, "id", None, "column 'id' is missing.*idd"),
        ({"id": ["a"], "other": [1.0]}, "id", None, "holds none of the features item, price, tags"),
        ({"id": ["a", None], "price": [1.0, 2.0]}, "id", None, "column 'id' holds 1 nulls"),
        ({"id": ["a", "a"], "price": [1.0, 2.0]}, "id", None, "id 'a' is there twice; name the column"),
        ({"id": ["a", "a"], "at": [3, 3], "price": [1.0, 2.0]}, "id", "at", "id 'a' is there twice at at 3"),
        ({"id": ["a"], "at": [0.5], "price": [1.0]}, "id", "at", "column 'at' is of type double; a time is"),
        ({"id": ["a"], "price": ["dear"]}, "id", None, "'price'.*string"),
    ],
)
def test_what_is_no_snapshot_is_refused(tmp_path: Path, columns: dict[str, object], key: str, time: str | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Snapshot(written(tmp_path / "items.parquet", **columns), SCHEMA, key=key, time=time)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="items.parquet: cannot be read as a snapshot"):
        Snapshot(tmp_path / "items.parquet", SCHEMA, key="id")
