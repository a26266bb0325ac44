"""Directories that are whole or refused: files with their SHA-256 in a manifest, written beside and renamed.

    draft = Draft(target)         a directory beside `target`; files go into draft.path, draft.entries says what they are
    draft.rename(extra)           it takes the target's place, all at once
    draft.release(extra)          its files go into a directory that readers may hold, the manifest last
    verify(target) -> Sealed(paths, extra)

The manifest carries its own digest too, so that no byte of a directory can change unseen.
"""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ninerank.errors import CheckpointError
from ninerank.files import replacing, sha256, sync

__all__ = ["MANIFEST", "Draft", "Sealed", "json_bytes", "read_manifest", "recover", "remove", "replace_file", "verify"]

MANIFEST = "manifest.json"
SET_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.old")


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


class Draft:
    """A directory beside `target` in which the next `target` is made; until it is renamed or released, nothing has changed."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = _beside(target, "tmp")
        self.entries: dict[str, dict[str, Any]] = {}
        self.path.mkdir(parents=True)

    def add(self, name: str, data: bytes) -> None:
        """Write a small file."""
        (self.path / name).write_bytes(data)
        sync(self.path / name)
        self.enter(name, hashlib.sha256(data).hexdigest(), len(data))

    def enter(self, name: str, digest: str, size: int) -> None:
        """Note a file that somebody wrote and synced; raises CheckpointError if it is not there."""
        path = self.path / name
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path}: is not there as it was written; all processes must write to one file system")
        self.entries[name] = {"sha256": digest, "bytes": size}

    def rename(self, extra: Mapping[str, Any]) -> None:
        """Take the target's place. An older target is set aside until then, so that `recover` finds it if this is cut short."""
        replace_file(self.path / MANIFEST, _seal(self.entries, extra))
        aside = _beside(self.target, "old") if self.target.exists() else None
        if aside is not None:
            self.target.rename(aside)
        self.path.rename(self.target)
        sync(self.target.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)

    def release(self, extra: Mapping[str, Any]) -> None:
        """Move the files into the target; until the new manifest is renamed into place, the old files stay and stay valid.

        Each file's name carries its digest there, so that old and new never share one.
        """
        self.target.mkdir(parents=True, exist_ok=True)
        for name, entry in self.entries.items():
            stem, dot, suffix = name.partition(".")
            entry["path"] = f"{stem}-{str(entry['sha256'])[:12]}{dot}{suffix}"
            (self.path / name).replace(self.target / entry["path"])
        replace_file(self.target / MANIFEST, _seal(self.entries, extra))
        keep = {MANIFEST, *(entry["path"] for entry in self.entries.values())}
        for path in self.target.iterdir():
            if path.name not in keep:
                path.unlink()
        self.discard()

    def discard(self) -> None:
        """Delete whatever is left of the draft."""
        shutil.rmtree(self.path, ignore_errors=True)


def recover(folder: Path, names: str) -> None:
    """Put back what was set aside for a new one that never came, and clear away what was left half done, of targets named so (a glob)."""
    for path in sorted(folder.glob(f".{names}.*")):
        aside = SET_ASIDE.fullmatch(path.name)
        if aside is not None and not (folder / aside["name"]).exists():
            path.rename(folder / aside["name"])
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove(target: Path) -> None:
    """Delete a directory; it is renamed first, so that a deletion cut short leaves nothing that looks whole."""
    doomed = _beside(target, "gone")
    target.rename(doomed)
    shutil.rmtree(doomed)


def verify(target: Path, *, rank: int = 0, world_size: int = 1) -> Sealed:
    """Check every file of `target`; raises CheckpointError that names the file which is missing, truncated or corrupt.

    Of several processes each reads its share of the files, and all look at the sizes.
    """
    content = read_manifest(target)
    paths = {}
    for i, (name, entry) in enumerate(sorted(content["files"].items())):
        path = paths[name] = target / entry.get("path", name)
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, though {MANIFEST} lists it")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: has {size} bytes, {MANIFEST} says {entry['bytes']}: the file is truncated or was changed")
        if i % world_size == rank:
            digest = sha256(path)
            if digest != entry["sha256"]:
                raise CheckpointError(f"{path}: SHA-256 is {digest}, {MANIFEST} says {entry['sha256']}: the file is corrupt")
    return Sealed(paths, content["extra"])


def read_manifest(target: Path) -> dict[str, Any]:
    """`files` and `extra` as they were sealed; raises CheckpointError for a directory without a sound manifest."""
    path = target / MANIFEST
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


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def _seal(entries: Mapping[str, Any], extra: Mapping[str, Any]) -> bytes:
    content = {"files": entries, "extra": extra}
    return json_bytes({"content": content, "sha256": hashlib.sha256(json_bytes(content)).hexdigest()})
