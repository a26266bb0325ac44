"""Directories of row files: Arrow IPC files under a manifest with the SHA-256 of each, complete or not there at all.

A directory is written under a temporary name beside its place, every file and the directory synced, then renamed. The manifest
also carries the SHA-256 of its own content, so that any changed byte is found. Rows are written in batches and never gathered twice.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ninerank.embedding.changes import Array, Column, RowBlock, column_of
from ninerank.errors import BundleError

__all__ = ["MANIFEST", "columns_from_json", "columns_to_json", "read_manifest", "read_rows", "seal", "sealing", "write_rows"]

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26
READ_BYTES = 1 << 22
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
ID = "id"


@contextmanager
def sealing(target: Path) -> Iterator[Path]:
    """Give a temporary directory; rename it to `target` on success, delete it on failure. Raises BundleError if `target` exists."""
    if target.exists():
        raise BundleError(f"{target}: exists already and is not written over")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(directory: Path, content: Mapping[str, Any]) -> str:
    """Write the manifest; returns the SHA-256 of its content, which stands for the whole directory."""
    digest = _content_digest(content)
    path = directory / MANIFEST
    path.write_bytes(json.dumps({"content": content, "sha256": digest}, sort_keys=True, indent=1).encode() + b"\n")
    _sync(path)
    return digest


def read_manifest(directory: Path, kind: str) -> tuple[dict[str, Any], str]:
    """Content and digest of a directory's manifest; raises BundleError if it is missing, corrupt or of another kind."""
    path = directory / MANIFEST
    try:
        size = path.stat().st_size
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: {size} bytes, a manifest has at most {MAX_MANIFEST_BYTES}")
        data = json.loads(path.read_bytes())
        content, digest = data["content"], data["sha256"]
        is_sound = isinstance(content, dict) and data.keys() == {"content", "sha256"} and digest == _content_digest(content)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}), so {directory} is not complete") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BundleError(f"{path}: is corrupt, it is no manifest") from None
    if not is_sound:
        raise BundleError(f"{path}: is corrupt, its content does not match the SHA-256 it carries")
    if content["kind"] != kind:
        raise BundleError(f"{path}: is a {content['kind']}, a {kind} is needed here")
    return content, str(digest)


def write_rows(directory: Path, name: str, columns: Mapping[str, Column], blocks: Iterable[RowBlock]) -> dict[str, Any]:
    """Write rows as the Arrow file `name`; returns its entry for the manifest: path, rows, bytes, sha256."""
    path, rows = directory / name, 0
    schema = pa.schema([(ID, pa.int64()), *((key, _arrow_type(key, column)) for key, column in columns.items())])
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
        for block in blocks:
            held = {key: column_of(value) for key, value in block.columns.items()}
            if held != dict(columns):
                raise ValueError(f"{path}: rows have the columns {held}, not {dict(columns)}")
            arrays = [_to_arrow(block.columns[key], column, schema.field(key).type) for key, column in columns.items()]
            writer.write_batch(pa.record_batch([pa.array(block.ids), *arrays], schema=schema))
            rows += len(block.ids)
    _sync(path)
    return {"path": name, "rows": rows, "bytes": path.stat().st_size, "sha256": _file_digest(path)}


def read_rows(directory: Path, entry: Mapping[str, Any], columns: Mapping[str, Column]) -> RowBlock:
    """Rows of a file after its size, SHA-256, types and order of ids were checked; raises BundleError."""
    path = directory / Path(entry["path"]).name
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(f"{path}: has {size} bytes, {MANIFEST} says {entry['bytes']}: the file is truncated or was changed")
        digest = _file_digest(path)
        if digest != entry["sha256"]:
            raise BundleError(f"{path}: SHA-256 is {digest}, {MANIFEST} says {entry['sha256']}: the file is corrupt")
        with pa.memory_map(str(path)) as stream:
            table = pa.ipc.open_file(stream).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from None
    wanted = {ID: pa.int64(), **{key: _arrow_type(key, column) for key, column in columns.items()}}
    held = {field.name: field.type for field in table.schema}
    if held != wanted:
        raise BundleError(f"{path}: columns are {held}, {MANIFEST} says {wanted}")
    if table.num_rows != entry["rows"]:
        raise BundleError(f"{path}: has {table.num_rows} rows, {MANIFEST} says {entry['rows']}")
    ids = _to_numpy(table.column(ID), Column("int64", 0))
    if (ids[1:] <= ids[:-1]).any():
        raise BundleError(f"{path}: ids are not distinct and in rising order")
    return RowBlock(ids, {key: _to_numpy(table.column(key), column) for key, column in columns.items()})


def columns_to_json(columns: Mapping[str, Column]) -> dict[str, Any]:
    return {name: {"dtype": column.dtype, "width": column.width} for name, column in columns.items()}


def columns_from_json(data: Mapping[str, Any]) -> dict[str, Column]:
    return {name: Column(entry["dtype"], entry["width"]) for name, entry in data.items()}


def _arrow_type(name: str, column: Column) -> pa.DataType:
    if column.dtype not in DTYPES or name == ID:
        raise BundleError(f"column {name!r} of {column.dtype}: the name {ID!r} is taken, and types are {', '.join(DTYPES)}")
    single = pa.from_numpy_dtype(np.dtype(column.dtype))
    return pa.list_(single, column.width) if column.width else single


def _to_arrow(values: Array, column: Column, arrow_type: pa.DataType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=arrow_type) if column.width else flat


def _to_numpy(chunks: pa.ChunkedArray, column: Column) -> Array:
    """One array of its own memory, so that the file may go."""
    if chunks.null_count:
        raise BundleError("a column holds nulls")
    shape = (column.width,) if column.width else ()
    parts = [(chunk.flatten() if column.width else chunk).to_numpy().reshape(-1, *shape) for chunk in chunks.chunks]
    return np.concatenate([np.empty((0, *shape), np.dtype(column.dtype)), *parts])


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
