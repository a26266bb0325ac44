"""The directory of a table on disk: `<directory>/<table>.tier`, the property of one process while it runs.

    lock         held (flock) as long as the owner lives; the system lets go of it however the owner ends
    owner.json   which table of which run this is, and whether the file is in use or was kept
    rows.bin     the records

It is scratch. Rows on the device are newer than those in the file, so that what a crash leaves is no state of any step: a restart of the
same run writes it anew and then loads its checkpoint. Refused, and left as they are: a directory in use by a living process, one of
another table or run, one that was kept on purpose, and whatever is no such directory.
"""

import fcntl
import os
import shutil
import weakref
from pathlib import Path
from typing import Literal

from ninerank.config import Config
from ninerank.errors import SpecError
from ninerank.files import replacing

__all__ = ["OWNER", "ROWS", "Owner", "ScratchDirectory"]

LOCK, OWNER, ROWS, DRAFT = "lock", "owner.json", "rows.bin", "rows.tmp"


class OwnerColumn(Config):
    """Place of a column in a record of 4-byte words; width 0: one number a row."""

    name: str
    first_word: int
    width: int
    dtype: Literal["float32", "int32"]


class Owner(Config):
    """What makes two runs of a table the same, and what a reader of its file needs."""

    format: Literal[1] = 1
    table: str
    num_rows: int
    columns: tuple[OwnerColumn, ...]
    optimizer: str | None
    lr: float
    seed: int
    init_std: float
    status: Literal["in use", "kept"] = "in use"


class ScratchDirectory:
    """Takes the directory for `owner`, empty but for the lock and the owner; raises SpecError where it may not."""

    def __init__(self, directory: str | Path, owner: Owner) -> None:
        self.path = Path(directory) / f"{owner.table}.tier"
        self.owner = owner
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_is_scratch()
            self._lock = self._take_lock()
        except OSError as error:
            raise SpecError(f"table {owner.table!r}: directory {self.path} cannot be used ({error.strerror})") from None
        self._release = weakref.finalize(self, os.close, self._lock)
        try:
            self._check_owner()
            for file in self.path.iterdir():
                if file.name != LOCK:
                    file.unlink()
            self._write_owner(owner)
        except OSError as error:
            self._release()
            raise SpecError(f"table {owner.table!r}: directory {self.path} cannot be written ({error.strerror})") from None
        except SpecError:
            self._release()
            raise

    @property
    def rows(self) -> Path:
        """Place of the records."""
        return self.path / ROWS

    @property
    def draft(self) -> Path:
        """Place of the records while their start is written."""
        return self.path / DRAFT

    def change_owner(self, owner: Owner) -> None:
        """Note that the file is about to be written anew for `owner`."""
        self.owner = owner
        self._write_owner(owner)

    def finish(self, *, keep: bool) -> None:
        """Mark the directory as kept, or remove it; give up the lock. A second call does nothing."""
        if not self._release.alive:
            return
        if keep:
            self._write_owner(self.owner.model_copy(update={"status": "kept"}))
        else:
            shutil.rmtree(self.path)
        self._release()

    def _check_is_scratch(self) -> None:
        """Nothing may be in the directory but what this module puts there."""
        others = sorted(file.name for file in self.path.iterdir() if not self._is_own(file))
        if others:
            raise SpecError(f"table {self.owner.table!r}: {self.path} holds {others[0]!r}, which no tier wrote; name another directory")

    @staticmethod
    def _is_own(file: Path) -> bool:
        is_draft = file.name.startswith(f".{OWNER}.") and file.name.endswith(".tmp")
        return (is_draft or file.name in (LOCK, OWNER, ROWS, DRAFT)) and file.is_file() and not file.is_symlink()

    def _take_lock(self) -> int:
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink == 0:
                raise BlockingIOError
        except BlockingIOError:
            os.close(lock)
            raise SpecError(
                f"table {self.owner.table!r}: {self.path} is in use by another process or table: name another directory"
            ) from None
        except OSError:
            os.close(lock)
            raise
        return lock

    def _check_owner(self) -> None:
        if not (self.path / OWNER).exists():
            return
        last = Owner.load(self.path / OWNER)
        advice = f"remove {self.path} or name another directory"
        if last.status == "kept":
            raise SpecError(f"table {self.owner.table!r}: the directory was kept by an earlier run; {advice}")
        for key, value in self.owner:
            if getattr(last, key) != value:
                raise SpecError(
                    f"table {self.owner.table!r}: the directory is another run's ({key} {getattr(last, key)!r}, here {value!r}); {advice}"
                )

    def _write_owner(self, owner: Owner) -> None:
        with replacing(self.path / OWNER) as temporary:
            temporary.write_text(owner.model_dump_json(indent=2), encoding="utf-8")
