"""Labels joined to logged requests: by id and by place, late duplicates, orphans, and files that do not fit."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from ninerank.errors import DataError
from ninerank.evaluation.joined import Labels

ROWS = {
    "request_id": ["001", "001", "2", "001", "ghost", "2"],
    "candidate_id": ["a", "b", "a", "a", "a", "zzz"],
    "label": [0, 0, 1, 1, 1, 1],
}


def write(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pa_csv.write_csv(table, path, pa_csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ","))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".tsv"])
def test_labels_join_by_candidate_id(tmp_path: Path, suffix: str) -> None:
    labels = Labels(write(tmp_path / f"labels{suffix}", **ROWS), ["click"])
    # "a" of request 001 came twice, 0 and then 1: the positive wins. "c" has no label.
    np.testing.assert_array_equal(labels.take("001", pa.array(["b", "a", "c"]), 3)[:, 0], [0, 1, math.nan])
    np.testing.assert_array_equal(labels.take("2", pa.array(["a"]), 1)[:, 0], [1])
    assert np.isnan(labels.take("3", pa.array(["a"]), 1)).all()
    assert labels.stats.as_dict() == {"rows": 6, "duplicates": 1, "labelled": 3, "unlabelled": 2, "orphans": 2}


def test_whole_numbers_are_ids_too(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.parquet", request_id=[7, 7], candidate_id=[10, 11], label=[True, False])
    np.testing.assert_array_equal(Labels(path, ["click"]).take("7", pa.array([11, 10]), 2)[:, 0], [0, 1])


def test_labels_join_by_index_and_by_task_name(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", request_id=["r", "r", "r"], index=[2, 0, 9], click=[1, 0, 1], buy=[0, 0, 1])
    labels = Labels(path, ["click", "buy"])
    np.testing.assert_array_equal(labels.take("r", None, 3), [[0, 0], [math.nan, math.nan], [1, 0]])
    assert labels.stats.orphans == 1


def test_a_candidate_that_is_there_twice_gets_its_label_twice(tmp_path: Path) -> None:
    labels = Labels(write(tmp_path / "labels.csv", request_id=["r"], candidate_id=["a"], label=[1]), ["click"])
    np.testing.assert_array_equal(labels.take("r", pa.array(["a", "a"]), 2)[:, 0], [1, 1])
    assert labels.stats.orphans == 0


def test_a_request_id_that_comes_again_finds_no_labels(tmp_path: Path) -> None:
    labels = Labels(write(tmp_path / "labels.csv", request_id=["r"], candidate_id=["a"], label=[1]), ["click"])
    labels.take("r", pa.array(["a"]), 1)
    assert np.isnan(labels.take("r", pa.array(["a"]), 1)).all()


def test_an_empty_table_has_no_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path / "l.parquet", request_id=pa.array([], pa.string()), index=pa.array([], pa.int64()), label=pa.array([], pa.int64())
    )
    assert np.isnan(Labels(path, ["click"]).take("r", None, 2)).all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"candidate_id": ["a"], "label": [1]}, "column 'request_id' is missing"),
        ({"request_id": ["r"], "candidat_id": ["a"], "label": [1]}, "'candidate_id' or 'index' is missing; did you mean|missing; valid"),
        ({"request_id": ["r"], "candidate_id": ["a"], "clicked": [1]}, "'click' or 'label' is missing"),
        ({"request_id": ["r"], "candidate_id": ["a"], "label": [3]}, "row 0: 3 is refused; a label is 0 or 1"),
        ({"request_id": ["r", "s"], "candidate_id": ["a", "b"], "label": [1, None]}, "'label', row 1: null"),
        ({"request_id": ["r", None], "candidate_id": ["a", "b"], "label": [1, 0]}, "'request_id' holds nulls"),
        ({"request_id": ["r"], "candidate_id": ["a"], "label": ["yes"]}, "label"),
        ({"request_id": [["r"]], "candidate_id": ["a"], "label": [1]}, "'request_id' is of type list"),
        ({"request_id": ["r"], "index": ["first"], "label": [1]}, "'index' is of type string"),
    ],
)
def test_label_files_that_do_not_fit_are_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Labels(write(tmp_path / "labels.parquet", **columns), ["click"])


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no file"):
        Labels(tmp_path / "gone.csv", ["click"])
    for name, content, message in (
        ("empty.csv", b"", r"is empty \(0 bytes\)"),
        ("short.parquet", b"PAR1abc", "cannot be read as labels"),
        ("labels.xlsx", b"x", "ending tells no format"),
        ("ragged.csv", b"request_id,index,label\nr,1\n", "cannot be read as labels"),
        ("index.csv", b"request_id,index,label\nr,x,1\n", "cannot be read as labels"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            Labels(tmp_path / name, ["click"])


def test_ids_asked_for_and_not_logged_are_refused(tmp_path: Path) -> None:
    labels = Labels(write(tmp_path / "labels.csv", request_id=["r"], candidate_id=["a"], label=[1]), ["click"])
    with pytest.raises(DataError, match="request 'r' was logged without candidate ids; labels need column 'index'"):
        labels.take("r", None, 2)
