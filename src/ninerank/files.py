"""Files and directories that are either wholly there or not there at all: written beside their place, synced, renamed."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["creating", "replacing", "sha256", "sync"]

READ_BYTES = 1 << 20


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file to; on success sync it to disk and rename it, on failure remove it.

    >>> import tempfile
    >>> notes = Path(tempfile.mkdtemp(), "notes.txt")
    >>> with replacing(notes) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> notes.read_text()
    'whole'
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) == temporary:
            error.filename = str(target)  # nobody knows the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def creating(path: str | Path) -> Iterator[Path]:
    """Give a new, empty directory beside `path`; on success sync all that is in it and rename it, on failure remove it.

    Raises FileExistsError where `path` is there already: a directory cannot be replaced in one step.
    """
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target}: exists already")
    temporary = _beside(target)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        error.filename = str(target)
        raise
    try:
        yield temporary
        for inner in (*temporary.rglob("*"), temporary):
            sync(inner)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
