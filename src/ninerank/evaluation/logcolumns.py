"""Columns of logs from anywhere, by the names that a mapping gives them, in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from ninerank.errors import DataError, nearest
from ninerank.features.columns import column_of, conform
from ninerank.features.files import ArrowLog, Dialect, LogFile, ParquetLog, TextLog, expand, format_of

__all__ = ["read_columns"]


def read_columns(
    paths: str | Path | Sequence[str | Path],
    numbers: Mapping[str, str],
    texts: Mapping[str, str],
    hints: Mapping[str, str] | None = None,
) -> dict[str, pa.Array]:
    """Columns by what they are called here: `numbers` as float64, `texts` as strings, of files or folders (also partitioned ones).

    hints: what to tell whoever lacks a column. Raises DataError for one that is missing, of a wrong type or holds nulls.
    """
    told = {column: f"; {hint}" for column, hint in (hints or {}).items()}
    columns = {**{name: (column, pa.float64()) for name, column in numbers.items()}, **{n: (c, pa.string()) for n, c in texts.items()}}
    found: dict[str, list[pa.Array]] = {name: [] for name in columns}
    for path in _files(paths):
        file = _open(path)
        wanted = list(dict.fromkeys(column for column, _ in columns.values()))
        for column in sorted(wanted, key=lambda column: column not in told):
            if column not in file.names:
                raise DataError(f"{path}: column {column!r} is missing ({nearest(column, file.names)}){told.get(column, '')}")
        for block in range(len(file.block_rows)):
            for batch in file.read(block, wanted):
                for name, (column, held) in columns.items():
                    array = conform(column_of(batch, column), held, column)
                    if array.null_count:
                        lack = f"column {column!r} has {array.null_count} nulls, every row needs a value{told.get(column, '')}"
                        raise DataError(f"{path}: {lack}")
                    found[name].append(array)
    if not all(found.values()):
        raise DataError(f"{paths}: no rows")
    return {name: pa.chunked_array(parts).combine_chunks() for name, parts in found.items()}


def _files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files, those of directories, and those of directories of partitions."""
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    inside = [sorted(path.rglob("*.parquet")) if path.is_dir() else [] for path in given]
    return expand([file for path, found in zip(given, inside, strict=True) for file in (found or [path])])


def _open(path: Path) -> LogFile:
    kind = format_of(path)
    if kind == "parquet":
        return ParquetLog(path)
    if kind == "arrow":
        return ArrowLog(path)
    if kind in ("csv", "tsv"):
        return TextLog(path, Dialect("," if kind == "csv" else "\t"), {})
    raise DataError(f"{path}: ending {path.suffix!r}: .parquet, .arrow, .csv or .tsv is needed")
