"""Log files by themselves: which format an ending means, blocks that can be read apart, and messages that name the file."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.errors import DataError
from ninerank.features.files import ArrowLog, Dialect, ParquetLog, TextLog, expand, format_of, reading

ROWS = pa.table({"n": list(range(10)), "name": list("abcdefghij")})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.csv", "csv"),
        ("a.tsv.gz", "tsv"),
        ("a.csv.zst", "csv"),
        ("part-0.snappy.parquet", "parquet"),
        ("a.feather", "arrow"),
        ("a.svm.bz2", "libsvm"),
        ("a.PARQUET", "parquet"),
        ("a.txt", None),
        ("a.gz", None),
        ("parquet", None),
    ],
)
def test_the_ending_tells_the_format(name: str, expected: str | None) -> None:
    assert format_of(Path(name)) == expected


def test_blocks_of_parquet_are_its_row_groups(tmp_path: Path) -> None:
    pq.write_table(ROWS, tmp_path / "a.parquet", row_group_size=4)
    log = ParquetLog(tmp_path / "a.parquet")
    assert log.names == ["n", "name"]
    assert log.block_rows == [4, 4, 2]
    assert [row for batch in log.read(1, ["n"]) for row in batch.to_pylist()] == [{"n": n} for n in range(4, 8)]


def test_blocks_of_arrow_are_its_record_batches_and_a_stream_is_one(tmp_path: Path) -> None:
    with pa.ipc.new_file(tmp_path / "a.arrow", ROWS.schema) as writer:
        writer.write_table(ROWS, max_chunksize=4)
    with pa.ipc.new_stream(tmp_path / "s.arrow", ROWS.schema) as writer:
        writer.write_table(ROWS, max_chunksize=4)
    file, stream = ArrowLog(tmp_path / "a.arrow"), ArrowLog(tmp_path / "s.arrow")
    assert file.block_rows == [4, 4, 2]
    assert stream.block_rows == [None]
    assert file.names == stream.names == ["n", "name"]
    assert [n for batch in file.read(2, ["n"]) for n in batch.column("n").to_pylist()] == [8, 9]
    assert [n for batch in stream.read(0, None) for n in batch.column("n").to_pylist()] == list(range(10))


def test_text_reads_columns_as_the_types_asked_for_and_only_an_empty_field_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b,c\nNA,01,1\n,null,\n"x,""y""",3,2\n')
    log = TextLog(tmp_path / "a.csv", Dialect(), {"a": pa.string(), "b": pa.string(), "c": pa.float64()})
    assert list(log.names) == ["a", "b", "c"]
    (batch,) = log.read(0, ["c", "a", "b"])
    assert batch.to_pylist() == [
        {"c": 1.0, "a": "NA", "b": "01"},
        {"c": None, "a": None, "b": "null"},
        {"c": 2.0, "a": 'x,"y"', "b": "3"},
    ]


def test_text_without_a_header_takes_the_dialect_s_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('1\t"x\n2\ty\n')
    log = TextLog(tmp_path / "a.txt", Dialect("\t", quoted=False, header=("n", "name")), {})
    assert list(log.names) == ["n", "name"]
    (batch,) = log.read(0, None)
    assert batch.to_pylist() == [{"n": 1, "name": '"x'}, {"n": 2, "name": "y"}]


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_line_ends_and_a_byte_order_mark(ending: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (ending or "\n").join(["n,name", "1,x"]).encode() + ending.encode())
    log = TextLog(tmp_path / "a.csv", Dialect(), {})
    assert list(log.names) == ["n", "name"]
    (batch,) = log.read(0, ["n", "name"])
    assert batch.to_pylist() == [{"n": 1, "name": "x"}]


def test_a_wrong_field_after_the_first_block_has_its_row_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ninerank.features.files.TEXT_BLOCK_BYTES", 256)
    (tmp_path / "a.csv").write_text("n\n" + "".join(f"{n}\n" for n in range(500)) + "x\n")
    log = TextLog(tmp_path / "a.csv", Dialect(), {"n": pa.int64()})
    with pytest.raises(DataError, match=re.escape("a.csv: column 'n', row 500 (line 502): 'x' is not a whole number that fits int64")):
        list(log.read(0, ["n"]))


def test_what_pyarrow_says_of_a_file_names_it_and_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(
        DataError, match=re.escape(f"{path}: cannot be read as Parquet (15 bytes; truncated, damaged or of another format?)")
    ):
        _ = ParquetLog(path).names
    with (
        pytest.raises(DataError, match=re.escape(f"{tmp_path / 'gone'}: cannot be read as text (0 bytes")),
        reading(tmp_path / "gone", "text"),
    ):
        (tmp_path / "gone").open()


def test_files_come_in_the_order_given_and_directories_by_name(tmp_path: Path) -> None:
    inside = tmp_path / "log"
    inside.mkdir()
    for path in (inside / "b.csv", inside / "a.csv", tmp_path / "first.csv"):
        path.write_text("n\n1\n")
    assert [path.name for path in expand([tmp_path / "first.csv", inside])] == ["first.csv", "a.csv", "b.csv"]
    assert expand(str(inside / "b.csv")) == [inside / "b.csv"]
