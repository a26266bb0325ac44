"""Log files as blocks of Arrow record batches: Parquet, Arrow IPC, and delimited text.

A block is what can be read without what lies before it: a row group, an IPC record batch, a whole text file.
Whatever pyarrow raises about a file comes out as DataError that names it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from ninerank.errors import DataError, nearest
from ninerank.features.columns import show

__all__ = ["ArrowLog", "Dialect", "LogFile", "ParquetLog", "TextLog", "expand", "reading"]

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".libsvm": "libsvm",
    ".svm": "libsvm",
}
COMPRESSED = {".gz", ".bz2", ".zst", ".lz4"}
ROWS_PER_READ = 1 << 16
TEXT_BLOCK_BYTES = 4 << 20


class LogFile(Protocol):
    """One file. names: its columns. block_rows: rows of each block, None where only reading tells."""

    @property
    def path(self) -> Path: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def block_rows(self) -> Sequence[int | None]: ...

    def read(self, block: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        """Record batches of a block in order, of the named columns (all if None)."""
        ...


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow and the system raise into DataError about `path`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise DataError(f"{path}: cannot be read as {kind} ({size} bytes; truncated, damaged or of another format?): {error}") from None


def expand(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files in order; a directory stands for its data files sorted by name. Raises DataError for what is not there, empty or unknown."""
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    files: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith((".", "_")) and format_of(f))
            if not inside:
                raise DataError(f"{path}: holds no data files; known endings: {', '.join(SUFFIXES)}")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            beside = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"{path}: is not there; {nearest(path.name, beside[:20])}" if beside else f"{path}: is not there")
    if not files:
        raise DataError("no log files were given")
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file}: is empty (0 bytes); a log holds at least one row")
    return files


def format_of(path: Path) -> str | None:
    """Format by the file's ending, a compression ending aside; None if unknown."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return SUFFIXES.get(suffix.lower())


@dataclass(frozen=True)
class ParquetLog:
    path: Path

    @cached_property
    def _file(self) -> pq.ParquetFile:
        with reading(self.path, "Parquet"):
            return pq.ParquetFile(self.path, page_checksum_verification=True)

    @cached_property
    def names(self) -> list[str]:
        return list(self._file.schema_arrow.names)

    @cached_property
    def block_rows(self) -> list[int | None]:
        metadata = self._file.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read(self, block: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        with reading(self.path, "Parquet"):
            yield from self._file.iter_batches(ROWS_PER_READ, row_groups=[block], columns=columns)


@dataclass(frozen=True)
class ArrowLog:
    """Arrow IPC, the file format (random access) or the stream format (one block)."""

    path: Path

    @cached_property
    def _file(self) -> pa.RecordBatchFileReader | None:
        with self.path.open("rb") as stream:
            if stream.read(6) != b"ARROW1":
                return None
        with reading(self.path, "Arrow IPC"):
            return pa.ipc.open_file(pa.memory_map(str(self.path)))

    def _stream(self) -> pa.RecordBatchStreamReader:
        return pa.ipc.open_stream(pa.memory_map(str(self.path)))

    @cached_property
    def names(self) -> list[str]:
        with reading(self.path, "Arrow IPC"):
            return list((self._file or self._stream()).schema.names)

    @cached_property
    def block_rows(self) -> list[int | None]:
        with reading(self.path, "Arrow IPC"):
            return [None] if self._file is None else [self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches)]

    def read(self, block: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        with reading(self.path, "Arrow IPC"):
            batches = self._stream() if self._file is None else [self._file.get_batch(block)]
            for batch in batches:
                yield batch if columns is None else batch.select(list(columns))


@dataclass(frozen=True)
class Dialect:
    """How a text file is cut: delimiter, whether quotes mean anything, and column names where the file has no header line."""

    delimiter: str = ","
    quoted: bool = True
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TextLog:
    """Delimited text. types: Arrow types by column, inferred for those not named; an empty field is null, nothing else is."""

    path: Path
    dialect: Dialect
    types: Mapping[str, pa.DataType]

    def _open(self, columns: Sequence[str] | None, types: Mapping[str, pa.DataType]) -> pc_csv.CSVStreamingReader:
        return pc_csv.open_csv(
            pa.input_stream(str(self.path), compression="detect"),
            read_options=pc_csv.ReadOptions(block_size=TEXT_BLOCK_BYTES, column_names=self.dialect.header),
            parse_options=pc_csv.ParseOptions(delimiter=self.dialect.delimiter, quote_char='"' if self.dialect.quoted else False),
            convert_options=pc_csv.ConvertOptions(
                column_types=dict(types),
                null_values=[""],
                strings_can_be_null=True,
                include_columns=None if columns is None else list(columns),
            ),
        )

    @cached_property
    def names(self) -> list[str]:
        if self.dialect.header:
            return list(self.dialect.header)
        with reading(self.path, "text"), pa.input_stream(str(self.path), compression="detect") as stream:
            head = stream.read(1 << 20).split(b"\n", 1)[0] + b"\n"
        with reading(self.path, "text"):
            options = pc_csv.ParseOptions(delimiter=self.dialect.delimiter, quote_char='"' if self.dialect.quoted else False)
            # One line needs no threads; a pool just started may abort a process that ends at once over an error.
            calm = pc_csv.ReadOptions(use_threads=False)
            try:
                return list(pc_csv.read_csv(pa.py_buffer(head), read_options=calm, parse_options=options).schema.names)
            except UnicodeDecodeError as error:
                raise DataError(f"{self.path}: its first line is not UTF-8 text ({error.reason} at byte {error.start})") from None

    block_rows = (None,)

    def read(self, block: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        types = {name: held for name, held in self.types.items() if columns is None or name in columns}
        try:
            yield from self._open(columns, types)
        except pa.ArrowInvalid as error:
            self._blame(columns, types)
            raise DataError(f"{self.path}: cannot be read as text with delimiter {self.dialect.delimiter!r}: {error}") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error})") from None

    def _blame(self, columns: Sequence[str] | None, types: Mapping[str, pa.DataType]) -> None:
        """Read again as strings and raise DataError about the first value that is not of its column's type."""
        row = 0
        try:
            for batch in self._open(columns, dict.fromkeys(self.names, pa.string())):
                for name, wanted in types.items():
                    column = batch.column(name)
                    try:
                        column.cast(wanted)
                    except pa.ArrowInvalid:
                        bad = next(i for i in range(len(column)) if not _casts(column.slice(i, 1), wanted))
                        line = row + bad + (1 if self.dialect.header else 2)
                        what = f"{show(column[bad])} is not {_words(wanted)}"
                        raise DataError(f"{self.path}: column {name!r}, row {row + bad} (line {line}): {what}") from None
                row += batch.num_rows
        except pa.ArrowInvalid:
            return


def _casts(value: pa.Array, wanted: pa.DataType) -> bool:
    try:
        pc.cast(value, wanted)
    except pa.ArrowInvalid:
        return False
    return True


def _words(wanted: pa.DataType) -> str:
    return {pa.int64(): "a whole number that fits int64", pa.float64(): "a number"}.get(wanted, str(wanted))
