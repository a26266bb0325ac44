"""Checkpoints of a run: saved while training goes on, the newest kept, a damaged one refused by name."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from ninerank.errors import CheckpointError
from ninerank.training import sealed
from ninerank.training.checkpoint.archive import Archive, Writing, save_archive, save_archive_later
from ninerank.training.checkpoint.peers import Peers
from ninerank.training.checkpoint.staging import HostBuffers
from ninerank.training.checkpoint.tree import Tree

__all__ = ["Checkpoint", "CheckpointStore"]

log = logging.getLogger(__name__)

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint(Archive):
    """A verified checkpoint: tensors by section as `Archive` reads them, and the JSON state."""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = json.loads(self.paths[STATE].read_bytes())
        return state


class CheckpointStore:
    """The checkpoints of one run; the newest `keep_last` are kept. All processes make one and call the same methods in the same order.

    asynchronous: `save` returns when what is to be saved has been copied to host memory; writing goes on in the background, one save
    at a time. An error of that writing is raised by the next `check`, `save`, `load`, `wait`, or the end of `with store:`.
    """

    def __init__(
        self, directory: Path, *, keep_last: int, spec_digest: str, asynchronous: bool = False, peers: Peers | None = None
    ) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self.spec_digest = spec_digest
        self.asynchronous = asynchronous
        self.peers = peers or Peers()
        self.buffers = HostBuffers()
        self._writing: Writing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # what ended the run is raised
        finally:
            self.buffers.close()

    def names(self) -> list[str]:
        """Complete or damaged, oldest first: `step-<n>`."""
        found = [path.name for path in self.directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=_step)

    def save(self, step: int, tree: Tree, state: Mapping[str, Any]) -> Path:
        """Save `tree` and the first process's `state` as `step-<step>`; only then the oldest beyond `keep_last` are deleted.

        A save that is still being written is waited for. Raises CheckpointError for what could not be written: this checkpoint, or,
        in the background, the one before.
        """
        self.wait()
        target = self.directory / f"step-{step}"
        files = {STATE: sealed.json_bytes(state)}

        def publish(draft: sealed.Draft, extra: dict[str, Any]) -> None:
            draft.rename(extra | {"step": step})
            sealed.recover(self.directory, "step-*")
            for name in self.names()[: -self.keep_last]:
                sealed.remove(self.directory / name)

        options: dict[str, Any] = {"spec_digest": self.spec_digest, "peers": self.peers}
        if self.asynchronous:
            self._writing = save_archive_later(target, tree, files, publish, buffers=self.buffers, **options)
            return target
        try:
            save_archive(target, tree, files, publish, **options)
        except CheckpointError as error:
            raise self._lost(error) from None
        return target

    def check(self) -> None:
        """Raise CheckpointError if the background writing has failed; returns at once."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; raises CheckpointError if what was could not be."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.wait()
        except CheckpointError as error:
            raise self._lost(error) from None

    def load(self, name: str | None = None) -> Checkpoint | None:
        """The checkpoint of that name, or the newest, or None where there is none.

        Raises CheckpointError for a name that is not there, a file that is missing, truncated or corrupt (the newest checkpoint
        before it that is sound is named), one of an older format, and one of another spec (both digests are named).
        """
        self.wait()
        names = self.peers.from_first(self._settled_names)
        if name is not None and name not in names:
            raise CheckpointError(f"{self.directory}: has no checkpoint {name!r}; there are: {', '.join(names) or 'none'}")
        if not names:
            return None
        chosen = name or names[-1]
        try:
            return self._open(chosen)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._offer(names[: names.index(chosen)])}") from None

    def _settled_names(self) -> list[str]:
        sealed.recover(self.directory, "step-*")
        return self.names()

    def _open(self, name: str) -> Checkpoint:
        archive = Archive.open(self.directory / name, spec_digest=self.spec_digest, peers=self.peers)
        return Checkpoint(archive.directory, archive.paths, archive.extra, archive.peers)

    def _offer(self, older: list[str]) -> str:
        for name in reversed(older):
            try:
                self._open(name)
            except CheckpointError:
                continue
            return f"the checkpoint before it, {name}, is sound: resume from that one with --resume-from {name}"
        return "there is no sound checkpoint before it"

    def _lost(self, error: CheckpointError) -> CheckpointError:
        names = self.names()
        return CheckpointError(f"{error}; " + (f"the newest one that was saved is {names[-1]}" if names else "no checkpoint was saved yet"))


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
