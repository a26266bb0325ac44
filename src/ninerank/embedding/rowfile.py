"""Directories of row files: Arrow IPC files under a manifest with the SHA-256 of each, complete or not there at all.

The manifest also carries the SHA-256 of its own content, so that any changed byte is found. Rows are written in batches, so that a
table need not be copied as a whole.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from ninerank.config import Config
from ninerank.embedding.changes import Array, Column, RowBlock, column_of
from ninerank.errors import BundleError, SpecError
from ninerank.files import creating, sha256

__all__ = ["MANIFEST", "RowFile", "read_manifest", "read_rows", "seal", "sealing", "write_rows"]

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26
MAX_WIDTH = 1 << 16
ID = "id"

Dtype = Literal["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
M = TypeVar("M", bound=Config)


class RowFile(Config):
    """A row file as its manifest lists it; `columns` are those beside the id."""

    path: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    columns: dict[str, Column]

    @field_validator("columns")
    @classmethod
    def _no_second_id(cls, columns: dict[str, Column]) -> dict[str, Column]:
        for name, column in columns.items():
            if name == ID or column.dtype not in get_args(Dtype) or not 0 <= column.width <= MAX_WIDTH:
                types = ", ".join(get_args(Dtype))
                raise ValueError(f"column {name!r} of {column}: {ID!r} is taken, widths are 0 to {MAX_WIDTH}, types {types}")
        return columns


@contextmanager
def sealing(target: Path) -> Iterator[Path]:
    """Give a temporary directory; rename it to `target` on success, delete it on failure. Raises BundleError if `target` exists."""
    if target.exists():
        raise BundleError(f"{target}: exists already and is not written over")
    with creating(target) as temporary:
        yield temporary


def seal(directory: Path, manifest: Config) -> str:
    """Write the manifest; returns the SHA-256 of its content, which stands for the whole directory."""
    data, digest = _manifest_bytes(manifest.model_dump(mode="json"))
    (directory / MANIFEST).write_bytes(data)
    return digest


def read_manifest(directory: Path, model: type[M], kind: str, file_format: int) -> tuple[M, str]:
    """A directory's manifest and its digest; raises BundleError if it is missing, corrupt, of another kind or format."""
    path = directory / MANIFEST
    try:
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: {size} bytes, a manifest has at most {MAX_MANIFEST_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}), so {directory} is not complete") from None
    try:
        content = json.loads(data)["content"]
        whole, digest = _manifest_bytes(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{path}: is corrupt, it is no manifest") from None
    if data != whole:
        raise BundleError(f"{path}: is corrupt, its bytes do not match the SHA-256 it carries")
    if not isinstance(content, dict) or content.get("format") != file_format:
        found = content.get("format") if isinstance(content, dict) else None
        raise BundleError(f"{path}: format {found}, this version reads {file_format}")
    if content.get("kind") != kind:
        raise BundleError(f"{path}: is a {content.get('kind')}, a {kind} is needed here")
    try:
        return model.parse(content, str(path)), digest
    except SpecError as error:
        raise BundleError(f"{error}: is no manifest of this format") from None


def write_rows(directory: Path, name: str, columns: Mapping[str, Column], blocks: Iterable[RowBlock]) -> RowFile:
    """Write rows as the Arrow file `name`, a batch per block."""
    path, rows = directory / name, 0
    schema = pa.schema([(ID, pa.int64()), *((key, _arrow_type(column)) for key, column in columns.items())])
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for block in blocks:
            held = {key: column_of(value) for key, value in block.columns.items()}
            if held != dict(columns):
                raise ValueError(f"{path}: rows have the columns {held}, not {dict(columns)}")
            arrays = [_to_arrow(block.columns[key], column) for key, column in columns.items()]
            writer.write_batch(pa.record_batch([pa.array(block.ids), *arrays], schema=schema))
            rows += len(block.ids)
    return RowFile(path=name, rows=rows, bytes=path.stat().st_size, sha256=sha256(path), columns=dict(columns))


def read_rows(directory: Path, entry: RowFile) -> RowBlock:
    """Rows of a file after its size, SHA-256, types and order of ids were checked; raises BundleError."""
    path = directory / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(f"{path}: has {size} bytes, {MANIFEST} says {entry.bytes}: the file is truncated or was changed")
        digest = sha256(path)
        if digest != entry.sha256:
            raise BundleError(f"{path}: SHA-256 is {digest}, {MANIFEST} says {entry.sha256}: the file is corrupt")
        with pa.memory_map(str(path)) as stream:
            table = pa.ipc.open_file(stream).read_all()
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from None
    wanted = {ID: pa.int64(), **{key: _arrow_type(column) for key, column in entry.columns.items()}}
    held = {field.name: field.type for field in table.schema}
    if held != wanted or table.num_columns != len(wanted):
        raise BundleError(f"{path}: columns are {held}, {MANIFEST} says {wanted}")
    if table.num_rows != entry.rows:
        raise BundleError(f"{path}: has {table.num_rows} rows, {MANIFEST} says {entry.rows}")
    if any(column.null_count for column in table.columns):
        raise BundleError(f"{path}: holds nulls, which rows never do")
    ids = _to_numpy(table.column(ID), Column("int64", 0))
    if (ids[1:] <= ids[:-1]).any():
        raise BundleError(f"{path}: ids are not distinct and in rising order")
    return RowBlock(ids, {key: _to_numpy(table.column(key), column) for key, column in entry.columns.items()})


def _manifest_bytes(content: Mapping[str, Any]) -> tuple[bytes, str]:
    """The bytes of a manifest, no two ways to write it, and the digest of its content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"content": content, "sha256": digest}, sort_keys=True, indent=1).encode() + b"\n", digest


def _arrow_type(column: Column) -> pa.DataType:
    single = pa.from_numpy_dtype(np.dtype(column.dtype))
    return pa.list_(single, column.width) if column.width else single


def _to_arrow(values: Array, column: Column) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=_arrow_type(column)) if column.width else flat


def _to_numpy(chunks: pa.ChunkedArray, column: Column) -> Array:
    """One array of its own memory, so that the file may go."""
    shape = (column.width,) if column.width else ()
    parts = [(chunk.flatten() if column.width else chunk).to_numpy().reshape(-1, *shape) for chunk in chunks.chunks]
    return np.concatenate([np.empty((0, *shape), np.dtype(column.dtype)), *parts])
