"""Directories that are whole or refused: files with their SHA-256 in a manifest, written beside and renamed.

    write(target, {"a.json": writer, ...}, extra)      a new directory, renamed when complete
    replace(target, {"a.json": writer, ...}, extra)    new files in a directory that readers may hold, the manifest last
    verify(target) -> Sealed(paths, extra)

The manifest carries its own digest too, so that no byte of a directory can change unseen.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ninerank.errors import CheckpointError
from ninerank.files import replacing, sha256, sync

__all__ = ["MANIFEST", "Sealed", "json_bytes", "replace", "replace_file", "verify", "write"]

MANIFEST = "manifest.json"

Writer = Callable[[Path], None]


@dataclass(frozen=True)
class Sealed:
    """A directory whose files were all checked: where each one lies, and what else its manifest says."""

    paths: Mapping[str, Path]
    extra: Mapping[str, Any]


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """JSON of `data` with sorted keys: equal data give equal bytes; NaN is refused."""
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, rename: a reader sees the old bytes or the new ones, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write(target: Path, files: Mapping[str, Writer], extra: Mapping[str, Any]) -> None:
    """Make the directory `target` from `files` (name -> what writes it), with `extra` in its manifest; an older `target` goes."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    entries = {}
    for name, writer in files.items():
        writer(temporary / name)
        sync(temporary / name)
        entries[name] = _entry(temporary / name)
    replace_file(temporary / MANIFEST, _seal(entries, extra))
    if target.exists():
        remove(target)
    temporary.rename(target)
    sync(target.parent)


def replace(target: Path, files: Mapping[str, Writer], extra: Mapping[str, Any]) -> None:
    """Give the directory `target` new files; until the new manifest is renamed into place, the old files stay and stay valid.

    Each file's name carries its digest, so that old and new never share one.
    """
    target.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, writer in files.items():
        temporary = target / f".{name}.{os.getpid()}.tmp"
        writer(temporary)
        sync(temporary)
        entry = _entry(temporary)
        stem, dot, suffix = name.partition(".")
        entry["path"] = f"{stem}-{str(entry['sha256'])[:12]}{dot}{suffix}"
        temporary.replace(target / entry["path"])
        entries[name] = entry
    replace_file(target / MANIFEST, _seal(entries, extra))
    keep = {MANIFEST, *(entry["path"] for entry in entries.values())}
    for path in target.iterdir():
        if path.name not in keep:
            path.unlink()


def remove(target: Path) -> None:
    """Delete a directory; it is renamed first, so that a deletion cut short leaves nothing that looks whole."""
    doomed = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    target.rename(doomed)
    shutil.rmtree(doomed)


def verify(target: Path) -> Sealed:
    """Check every file of `target`; raises CheckpointError that names the file which is missing, truncated or corrupt."""
    content = _read_manifest(target / MANIFEST)
    paths = {}
    for name, entry in content["files"].items():
        path = paths[name] = target / entry.get("path", name)
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, though {MANIFEST} lists it")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: has {size} bytes, {MANIFEST} says {entry['bytes']}: the file is truncated or was changed")
        digest = sha256(path)
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path}: SHA-256 is {digest}, {MANIFEST} says {entry['sha256']}: the file is corrupt")
    return Sealed(paths, content["extra"])


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def _seal(entries: Mapping[str, Any], extra: Mapping[str, Any]) -> bytes:
    content = {"files": entries, "extra": extra}
    return json_bytes({"content": content, "sha256": hashlib.sha256(json_bytes(content)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, so {path.parent} is no complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        content = json.loads(data)["content"]
        sound = data == _seal(content["files"], content["extra"])
    except (ValueError, KeyError, TypeError):
        sound, content = False, {}
    if not sound:
        raise CheckpointError(f"{path}: is corrupt, its bytes do not match the SHA-256 it carries")
    return dict(content)
