"""Files of every format as checked batches: order, ranks, resuming, and the errors that name the file."""

import gzip
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.features.reader import Reader
from ninerank.features.sources.criteo import COLUMNS, criteo_spec
from ninerank.features.spec import FeatureSpec

HASHED = {"kind": "hashed", "num_buckets": 50}
SPEC = FeatureSpec.parse(
    {
        "labels": ["click"],
        "weight": "weight",
        "group": "session",
        "features": [
            {"kind": "id", "name": "user", "role": "user", "encoding": HASHED},
            {"kind": "id", "name": "code", "role": "item", "dtype": "int64", "encoding": HASHED},
            {"kind": "id", "name": "tags", "role": "item", "multi": True, "encoding": HASHED},
            {"kind": "numeric", "name": "price", "role": "item"},
        ],
    },
    "spec",
)
ROWS = pa.table(
    {
        "session": pa.array([10, 10, 11]),
        "click": pa.array([1.0, 0.0, 1.0]),
        "weight": pa.array([1.0, 2.0, 0.5]),
        "user": pa.array(["ann", None, "bob, the 3rd"]),
        "code": pa.array([7, None, -1]),
        "tags": pa.array([["x", "y"], None, ["x"]]),
        "price": pa.array([1.5, 2.0, None]),
    }
)
CSV = 'session,click,weight,user,code,tags,price,unused\n10,1,1,ann,7,x|y,1.5,u\n10,0,2,,,,2,\n11,1,0.5,"bob, the 3rd",-1,x,,u\n'
WANTED = ["click", "weight", "user", "code", "tags", "price", "session"]

Numbered = Callable[..., list[Path]]


def read(reader: Reader, epoch: int = 0, start_batch: int = 0) -> list[pa.RecordBatch]:
    return list(reader.epoch(epoch, start_batch))


def numbers(batches: Sequence[pa.RecordBatch]) -> list[list[int]]:
    return [batch.column("n").to_pylist() for batch in batches]


def flat(batches: Sequence[pa.RecordBatch]) -> list[int]:
    return [n for batch in numbers(batches) for n in batch]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Numbered:
    """Files that together hold rows 0, 1, ..., `count` in all, in row groups or record batches of 7."""

    def write(count: int = 100, num_files: int = 2, kind: str = "parquet") -> list[Path]:
        directory = tmp_path_factory.mktemp("numbered")
        files = []
        for i, part in enumerate(np.array_split(np.arange(count), num_files)):
            rows, path = pa.table({"n": part}), directory / f"part-{i}.{kind}"
            if kind == "parquet":
                pq.write_table(rows, path, row_group_size=7)
            elif kind == "arrow":
                with pa.ipc.new_file(path, rows.schema) as writer:
                    writer.write_table(rows, max_chunksize=7)
            else:
                path.write_text("n\n" + "".join(f"{n}\n" for n in part))
            files.append(path)
        return files

    return write


def write_parquet(path: Path) -> None:
    pq.write_table(ROWS, path)


def write_arrow(path: Path) -> None:
    with pa.ipc.new_file(path, ROWS.schema) as writer:
        writer.write_table(ROWS)


def write_stream(path: Path) -> None:
    with pa.ipc.new_stream(path, ROWS.schema) as writer:
        writer.write_table(ROWS)


def write_csv(path: Path) -> None:
    path.write_text(CSV)


def write_tsv(path: Path) -> None:
    path.write_text(CSV.replace('"bob, the 3rd"', "bob; the 3rd").replace(",", "\t").replace(";", ","))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(CSV.encode()))


FORMATS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.parquet", write_parquet),
    ("a.pq", write_parquet),
    ("a.arrow", write_arrow),
    ("stream.arrow", write_stream),
    ("a.csv", write_csv),
    ("a.CSV", write_csv),
    ("a.tsv", write_tsv),
    ("a.csv.gz", write_gzip),
]


@pytest.mark.parametrize(("name", "write"), FORMATS, ids=[name for name, _ in FORMATS])
def test_every_format_gives_the_same_rows(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    reader = Reader(tmp_path / name, spec=SPEC)
    (batch,) = read(reader)
    assert batch.schema.names == WANTED
    expected = ROWS.select(WANTED)
    assert batch.schema.field("tags").type == pa.list_(pa.string())
    for column in WANTED[:-1]:
        assert batch.column(column).to_pylist() == expected.column(column).to_pylist(), column
    assert [int(value) for value in batch.column("session").to_pylist()] == [10, 10, 11]
    assert reader.num_rows == 3


def test_criteo(tmp_path: Path) -> None:
    counts, categories = ["1", "-2", *[""] * 11], ["68fd1e64", "", '"quote', *["x"] * 23]
    lines = ["\t".join(["1", *counts, *categories]), "\t".join(["0", *[""] * 13, *[""] * 26])]
    path = tmp_path / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    (batch,) = read(Reader(path, format="criteo", spec=criteo_spec(num_buckets=10)))
    assert set(batch.schema.names) == set(COLUMNS)
    rows = batch.to_pylist()
    assert [row["label"] for row in rows] == [1.0, 0.0]
    assert (rows[0]["I1"], rows[0]["I2"], rows[0]["I3"]) == (1.0, -2.0, None)
    assert (rows[0]["C1"], rows[0]["C3"], rows[0]["C26"]) == ("68fd1e64", '"quote', "x")
    assert not any(value for column, value in rows[1].items() if column != "label")


LIBSVM_SPEC = FeatureSpec.parse(
    {
        "labels": ["label"],
        "features": [
            {"kind": "id", "name": "index", "role": "item", "dtype": "int64", "multi": True, "encoding": HASHED},
            {"kind": "numeric", "name": "size", "role": "item", "column": "f9"},
        ],
    },
    "spec",
)


def test_libsvm(tmp_path: Path) -> None:
    path = tmp_path / "a.libsvm"
    path.write_text("# a comment\n+1 qid:4 3:1 7:1 9:0.5\n\n-1 2:1 8:0 # another\n0\n1 9:2")
    (batch,) = read(Reader(path, spec=LIBSVM_SPEC))
    assert batch.column("label").to_pylist() == [1.0, 0.0, 0.0, 1.0]
    assert batch.column("index").to_pylist() == [[3, 7], [2], [], []]
    assert batch.column("f9").to_pylist() == [0.5, 0.0, 0.0, 2.0]
    (every,) = read(Reader(path, extra_columns=["qid"], spec=LIBSVM_SPEC))
    assert every.column("qid").to_pylist() == [4, None, None, None]


def test_libsvm_lines_may_be_labels_alone(tmp_path: Path) -> None:
    (tmp_path / "a.libsvm").write_text("1\n0\n")
    (batch,) = read(Reader(tmp_path / "a.libsvm", spec=LIBSVM_SPEC))
    assert batch.column("label").to_pylist() == [1.0, 0.0]
    assert batch.column("index").to_pylist() == [[], []]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1 3:2.5", "row 1: 3:2.5 has a weight; .*column 'f3'"),
        ("1 x:1", "row 1: 'x' is not an index"),
        ("1 3", "row 1: '3' is not index:value"),
        ("yes 3:1", "row 1: 'yes' is not a label"),
        ("2 3:1", "column 'label', row 1: 2.0 is refused; a label is 0 or 1"),
        ("1 9:nan", "column 'f9', row 1: nan is refused"),
    ],
)
def test_wrong_libsvm_lines_are_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.libsvm"
    path.write_text(f"0 1:1\n{line}\n")
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: {said}"):
        read(Reader(path, spec=LIBSVM_SPEC))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
def test_without_a_seed_rows_come_in_file_order(kind: str, numbered: Numbered) -> None:
    reader = Reader(numbered(100, 3, kind), batch_size=8)
    batches = numbers(read(reader, epoch=5))
    assert [len(batch) for batch in batches] == [8] * 12 + [4]
    assert [n for batch in batches for n in batch] == list(range(100))
    assert reader.num_rows == 100
    assert reader.num_batches == 13


def test_a_directory_stands_for_its_data_files_by_name(numbered: Numbered) -> None:
    directory = numbered(20, 3)[0].parent
    (directory / "_SUCCESS").touch()
    (directory / ".hidden.parquet").write_text("x")
    (directory / "notes.txt").write_text("x")
    assert flat(read(Reader(directory))) == list(range(20))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize("shuffle_rows", [1 << 20, 30])
def test_an_epoch_is_a_permutation_of_all_rows_fixed_by_seed_and_epoch(kind: str, shuffle_rows: int, numbered: Numbered) -> None:
    files = numbered(100, 3, kind)

    def epoch(seed: int, number: int) -> list[list[int]]:
        return numbers(read(Reader(files, batch_size=9, seed=seed, shuffle_rows=shuffle_rows), number))

    first = epoch(1, 0)
    assert sorted(n for batch in first for n in batch) == list(range(100))
    assert first == epoch(1, 0)
    assert first != epoch(1, 1)
    assert first != epoch(2, 0)
    assert first != numbers(read(Reader(files, batch_size=9)))


def test_one_reader_gives_an_epoch_again(numbered: Numbered) -> None:
    reader = Reader(numbered(50), batch_size=9, seed=1)
    first = numbers(read(reader))
    read(reader, 1)
    assert numbers(read(reader)) == first


def test_a_window_mixes_rows_of_several_files(numbered: Numbered) -> None:
    order = flat(read(Reader(numbered(1000, 2), batch_size=50, seed=0, shuffle_rows=200)))
    assert {n < 500 for n in order[:200]} == {True, False}


@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 5),
    shuffle_rows=st.sampled_from([5, 16, 1000]),
    seed=st.sampled_from([None, 3]),
    kind=st.sampled_from(["parquet", "csv"]),
)
def test_ranks_part_the_rows_and_any_batch_can_be_resumed_at(
    count: int, batch_size: int, world_size: int, shuffle_rows: int, seed: int | None, kind: str, numbered: Numbered
) -> None:
    files = numbered(count, 2 if count > 1 else 1, kind)
    seen = []
    for rank in range(world_size):
        own = Reader(files, batch_size=batch_size, seed=seed, shuffle_rows=shuffle_rows, rank=rank, world_size=world_size)
        batches = numbers(read(own, 2))
        assert len(batches) == own.num_batches
        assert all(len(batch) == batch_size for batch in batches[:-1])
        for start in {0, 1, len(batches) // 2, len(batches)}:
            again = Reader(files, batch_size=batch_size, seed=seed, shuffle_rows=shuffle_rows, rank=rank, world_size=world_size)
            assert numbers(read(again, 2, start)) == batches[start:]
        rows = [n for batch in batches for n in batch]
        assert abs(len(rows) - count / world_size) < 1
        seen += rows
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("seed", [None, 1])
def test_drop_last_gives_every_rank_as_many_full_batches(seed: int | None, numbered: Numbered) -> None:
    files = numbered(103)
    for rank in range(4):
        reader = Reader(files, batch_size=10, seed=seed, rank=rank, world_size=4, drop_last=True)
        assert [len(batch) for batch in numbers(read(reader))] == [10, 10]
        assert reader.num_batches == 2


def test_known_rows_takes_no_reading(numbered: Numbered) -> None:
    assert Reader(numbered(30)).known_rows == 30
    text = Reader(numbered(30, 2, "csv"))
    assert text.known_rows is None
    assert text.num_rows == text.known_rows == 30


def test_resuming_skips_what_can_be_skipped(numbered: Numbered, monkeypatch: pytest.MonkeyPatch) -> None:
    from ninerank.features.files import ParquetLog

    blocks: list[int] = []
    plain = ParquetLog.read

    def spy(self: ParquetLog, block: int, columns: Sequence[str] | None) -> Any:
        blocks.append(block)
        return plain(self, block, columns)

    monkeypatch.setattr(ParquetLog, "read", spy)
    assert flat(read(Reader(numbered(70, 1), batch_size=7), start_batch=8)) == list(range(56, 70))
    assert blocks == [8, 9]


def test_extra_columns_pass_unchanged(tmp_path: Path) -> None:
    pq.write_table(ROWS.append_column("note", pa.array(["p", "q", None])), tmp_path / "a.parquet")
    (batch,) = read(Reader(tmp_path / "a.parquet", spec=SPEC, extra_columns=["note", "user"]))
    assert batch.schema.names == [*WANTED, "note"]
    assert batch.column("note").to_pylist() == ["p", "q", None]


def replaced(name: str, values: Any) -> pa.Table:
    return ROWS.set_column(ROWS.schema.get_field_index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("click", [0, 1, 2], "column 'click', row 2: 2.0 is refused; a label is 0 or 1"),
        ("click", [0, None, 1], "column 'click', row 1: null is refused; a label is 0 or 1"),
        ("click", ["a", "b", "c"], "column 'click' is of type string"),
        ("weight", [1.0, 1.0, -0.5], "column 'weight', row 2: -0.5 is refused; a weight is finite and >= 0"),
        ("weight", [1.0, float("inf"), 1.0], "column 'weight', row 1: inf is refused"),
        ("price", [1.0, float("nan"), 1.0], "column 'price', row 1: nan is refused; a number is finite"),
        ("code", [1.0, 2.0, 0.5], "column 'code', row 2: 0.5 cannot be an id"),
        ("tags", [1, 2, 3], "column 'tags' is of type int64; a feature with many ids takes lists of string"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(column: str, values: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(replaced(column, values), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: {said}")):
        read(Reader(path, spec=SPEC))


def test_a_null_group_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(replaced("session", [1, None, 2]), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: column 'session', row 1: null cannot be a group")):
        read(Reader(path, spec=SPEC))


@pytest.mark.parametrize("groups", [(pa.int32(), pa.int64()), (pa.string(), pa.large_string())], ids=["integers", "strings"])
def test_groups_of_several_files_are_joined(groups: tuple[pa.DataType, pa.DataType], tmp_path: Path) -> None:
    for i, held in enumerate(groups):
        session = pa.array([1, 2, 3]).cast(held)
        pq.write_table(ROWS.set_column(0, "session", session), tmp_path / f"{i}.parquet")
    (batch,) = read(Reader(tmp_path, spec=SPEC, seed=0))
    assert sorted(int(value) for value in batch.column("session").to_pylist()) == [1, 1, 2, 2, 3, 3]


def test_a_bag_in_one_string_is_cut_at_the_separator_in_any_format(tmp_path: Path) -> None:
    pq.write_table(replaced("tags", ["x|y", "y", None]), tmp_path / "a.parquet")
    assert read(Reader(tmp_path / "a.parquet", spec=SPEC))[0].column("tags").to_pylist() == [["x", "y"], ["y"], None]


@pytest.mark.parametrize("seed", [None, 0])
def test_the_row_in_an_error_is_the_row_of_the_file(seed: int | None, tmp_path: Path) -> None:
    labels = np.zeros(1000)
    labels[777] = 3.0
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"click": labels, "user": ["u"] * 1000}), path, row_group_size=100)
    spec = SPEC.model_copy(update={"features": SPEC.features[:1], "weight": None, "group": None})
    with pytest.raises(DataError, match="column 'click', row 777: 3.0"):
        read(Reader(path, spec=spec, seed=seed, batch_size=33))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("10,0,2,,,,2,", "10,0,2,,7.5,,2,", "column 'code', row 1 (line 3): '7.5' is not a whole number that fits int64"),
        ("10,0,2,,,,2,", "10,0,2,,,,cheap,", "column 'price', row 1 (line 3): 'cheap' is not a number"),
        ("10,0,2,,,,2,", "10,2,2,,,,2,", "column 'click', row 1: 2.0 is refused"),
        ("10,0,2,,,,2,", "10,,2,,,,2,", "column 'click', row 1: null is refused"),
        ("10,0,2,,,,2,", "10,0,2,,", "cannot be read as text with delimiter ','"),
    ],
)
def test_a_wrong_field_of_text_is_named_with_its_line(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(CSV.replace(old, new))
    with pytest.raises(DataError, match=re.escape(f"{path}: {said}")):
        read(Reader(path, spec=SPEC))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
def test_a_missing_column_is_named_before_any_row_is_read(name: str, tmp_path: Path) -> None:
    path, rows = tmp_path / name, ROWS.drop_columns(["price"]).append_column("prise", ROWS["price"])
    if name == "a.parquet":
        pq.write_table(rows, path)
    elif name == "a.csv":
        path.write_text(CSV.replace("price", "prise"))
    else:
        with pa.ipc.new_file(path, rows.schema) as writer:
            writer.write_table(rows)
    with pytest.raises(DataError, match=re.escape(f"{path}: column 'price' is missing; did you mean 'prise'")):
        Reader(path, spec=SPEC)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV.replace("unused", "user"))
    with pytest.raises(DataError, match="column 'user' is there 2 times"):
        Reader(tmp_path / "a.csv", spec=SPEC)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow", "a.libsvm"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}: is empty (0 bytes)")):
        Reader(tmp_path / name)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_a_file_without_rows_is_refused(name: str, seed: int | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.csv":
        path.write_text(CSV.split("\n", 1)[0] + "\n")
    else:
        pq.write_table(ROWS.slice(0, 0), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: no rows")):
        read(Reader(path, spec=SPEC, seed=seed))


@pytest.mark.parametrize(("name", "write"), [FORMATS[0], FORMATS[2], FORMATS[3], FORMATS[7]], ids=["parquet", "arrow", "stream", "gzip"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_file_is_refused(name: str, write: Callable[[Path], None], keep: float, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=re.escape(str(path))):
        read(Reader(path, spec=SPEC))


@pytest.mark.parametrize("at", [0.2, 0.5])
def test_a_damaged_page_is_refused_where_the_file_has_checksums(at: float, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.table({"n": np.random.default_rng(0).integers(0, 1 << 60, 5000)})
    pq.write_table(rows, path, compression="zstd", use_dictionary=False, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    place = int(len(data) * at)
    data[place : place + 64] = bytes(64)
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(Reader(path))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CSV.replace("ann", "XX").encode().replace(b"XX", b"\xff\xfe"))
    with pytest.raises(DataError, match=re.escape(str(path))):
        read(Reader(path, spec=SPEC))


def test_a_file_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv")
    with pytest.raises(DataError, match="trian.csv: is not there; did you mean 'train.csv'"):
        Reader(tmp_path / "trian.csv")
    with pytest.raises(DataError, match="is not there"):
        Reader(tmp_path / "no" / "train.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no data files; known endings: .csv"):
        Reader(tmp_path / "folder")
    with pytest.raises(DataError, match="no log files were given"):
        Reader([])


def test_an_ending_that_tells_no_format_asks_for_one(tmp_path: Path) -> None:
    write_csv(tmp_path / "log.txt")
    with pytest.raises(DataError, match="its ending tells no format; say format: csv, tsv"):
        Reader(tmp_path / "log.txt")
    assert Reader(tmp_path / "log.txt", format="csv", spec=SPEC).num_rows == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "parket"}, "unknown format 'parket'; did you mean 'parquet'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"shuffle_rows": 0}, "shuffle_rows 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world size 2"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str, numbered: Numbered) -> None:
    with pytest.raises(DataError, match=said):
        Reader(numbered(3, 1), **settings)


def test_a_negative_epoch_is_refused(numbered: Numbered) -> None:
    with pytest.raises(DataError, match="epoch -1"):
        read(Reader(numbered(3, 1)), -1)


def test_the_raw_criteo_sample(data_dir: Path) -> None:
    folder = data_dir / "criteo_sample"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    rows = {}
    for split in ("train", "dev", "test"):
        reader = Reader(folder / f"{split}.csv", format="criteo", spec=criteo_spec(num_buckets=1000), seed=0)
        rows[split] = sum(batch.num_rows for batch in reader.epoch())
    assert rows == {"train": 7200, "dev": 409, "test": 391}
