"""Directories of tensors that many processes write and read: `torch.distributed.checkpoint` between its planners and its storage.

What N processes saved, M may read, in whatever shards: a reader asks for blocks and gets them from whatever blocks overlap.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from ninerank.embedding.dynamic.state import own_shard
from ninerank.embedding.shard import Shard
from ninerank.errors import CheckpointError
from ninerank.training import sealed
from ninerank.training.checkpoint.peers import Peers
from ninerank.training.checkpoint.planner import ShardLoadPlanner, ShardSavePlanner
from ninerank.training.checkpoint.staging import HostBuffers
from ninerank.training.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from ninerank.training.checkpoint.tensorfile import TORCH_DTYPES, read_tensor
from ninerank.training.checkpoint.tree import Leaf, Tree, flatten_tree, part_key

__all__ = ["FORMAT", "Archive", "Writing", "save_archive", "save_archive_later"]

FORMAT = "ninerank.checkpoint.v2"
OLDER = ("ninerank.checkpoint.v1",)
Publish = Callable[[sealed.Draft, dict[str, Any]], None]


@dataclass(frozen=True)
class Archive:
    """A directory that was verified. world_size: of the processes that wrote it. extra: what else its manifest says."""

    directory: Path
    paths: Mapping[str, Path]
    extra: Mapping[str, Any]
    peers: Peers

    @classmethod
    def open(cls, directory: Path, *, spec_digest: str, peers: Peers) -> "Archive":
        """Verify every file, each by one of the processes.

        Raises CheckpointError for a file that is missing, truncated or corrupt, for another format, and for another spec.
        """

        def check() -> sealed.Sealed:
            check_manifest(directory, sealed.read_manifest(directory)["extra"], spec_digest)
            return sealed.verify(directory, rank=peers.rank, world_size=peers.world_size)

        found = peers.together(check)[peers.rank]
        return cls(directory, found.paths, found.extra, peers)

    @property
    def world_size(self) -> int:
        return int(self.extra["world_size"])

    def read(self, tree: Tree) -> None:
        """Fill the tensors of `tree` in place, each process its own; the sections (first keys) that are named must be there in full.

        Raises CheckpointError, before anything is changed, for a tensor that is missing, left over, or of another shape or dtype.
        """
        leaves = flatten_tree(tree, rank=0, world_size=1).leaves  # a plain tensor is read by every process
        asked = set().union(*self.peers.together(lambda: set(leaves)))
        sections = tuple(f"{section}." for section in tree)
        parts = {
            part_key(name, int(rank), column)
            for name, part in self.extra["parts"].items()
            for rank, share in part["ranks"].items()
            for column in share["columns"]
        }
        left = sorted(name for name in self.extra["tensors"] if name.startswith(sections) and name not in parts | asked)
        if left:
            raise CheckpointError(f"{self.directory}: does not fit the model of the recipe: it has {left[0]!r}, which the model has not")
        self._fill(leaves)

    def section(self, section: str, into: Mapping[str, Tensor | Shard] | None = None) -> dict[str, Any]:
        """All tensors of a section by their names in it: those that `into` has are filled in place, the others whole in new host memory."""
        given = into or {}
        found = {name: given[name] if name in given else self._empty(f"{section}.{name}") for name in self._names(section)}
        self._fill(flatten_tree({section: found}, rank=0, world_size=1).leaves)
        return found

    def by_id(self, name: str, *, rank: int | None = None, world_size: int | None = None) -> dict[str, Tensor]:
        """State of a dynamic table: the ids that `shard_of` gives this process (or process `rank` of `world_size`), in rising order.

        The files are read one after the other; only rows that are kept stay in memory. Raises CheckpointError if the table is not there.
        """
        rank, world_size = self.peers.rank if rank is None else rank, world_size or self.peers.world_size
        part = self._part(name, "by_id")
        ranks = part["ranks"]
        if world_size == self.world_size == len(ranks) and all(share["is_dealt"] for share in ranks.values()):
            ranks = {str(rank): ranks[str(rank)]}
        return own_shard([_Columns(self, name, int(owner), share["columns"]) for owner, share in ranks.items()], rank, world_size)

    def own(self, name: str) -> dict[str, Tensor] | None:
        """What this process saved for itself; None if another number of processes saved."""
        part = self._part(name, "per_process")
        if self.peers.world_size != self.world_size:
            return None
        return dict(_Columns(self, name, self.peers.rank, part["ranks"][str(self.peers.rank)]["columns"]))

    def is_by_id(self, name: str) -> bool:
        """Whether a leaf is a table by id."""
        return bool(self.extra["parts"].get(name, {}).get("kind") == "by_id")

    def has(self, section: str) -> bool:
        """Whether a section has tensors that are not kept apart by process."""
        return bool(self._names(section))

    def _names(self, section: str) -> list[str]:
        """Names in a section, without what is kept apart by process."""
        start, kept_apart = f"{section}.", tuple(f"{name}[" for name in self.extra["parts"])
        return [name.removeprefix(start) for name in self.extra["tensors"] if name.startswith(start) and not name.startswith(kept_apart)]

    def _empty(self, name: str) -> Tensor:
        """New host memory for a tensor, by its full name."""
        entry = self.extra["tensors"][name]
        return torch.empty(entry["shape"], dtype=TORCH_DTYPES[entry["dtype"]])

    def _part(self, name: str, kind: str) -> Mapping[str, Any]:
        part: Mapping[str, Any] = self.extra["parts"].get(name, {})
        if part.get("kind") != kind:
            known = [other for other, entry in self.extra["parts"].items() if entry["kind"] == kind]
            raise CheckpointError(
                f"{self.directory}: holds no {name!r} kept {kind.replace('_', ' ')}; it has: {', '.join(known) or 'none'}"
            )
        return part

    def tensor(self, name: str) -> Tensor:
        """One process's own tensor by its full name."""
        (block,) = self.extra["tensors"][name]["blocks"]
        return read_tensor(self.paths[block["file"]], block["key"])

    def _fill(self, leaves: Mapping[str, Leaf]) -> None:
        _quiet()
        reader = SafetensorsReader(self.paths, self.extra["tensors"])
        planner = ShardLoadPlanner(str(self.directory))
        try:
            load(dict(leaves), storage_reader=reader, planner=planner, process_group=self.peers.group, no_dist=self.peers.group is None)
        except CheckpointException as error:
            raise reason(error, f"{self.directory}: cannot be read") from None


class _Columns(Mapping[str, Tensor]):
    """One process's tensors, read when asked for."""

    def __init__(self, archive: Archive, name: str, rank: int, columns: list[str]) -> None:
        self._archive = archive
        self._keys = {column: part_key(name, rank, column) for column in columns}

    def __getitem__(self, column: str) -> Tensor:
        return self._archive.tensor(self._keys[column])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Writing:
    """A save on a background thread. The interpreter does not exit before it has ended."""

    def __init__(self, target: Path, future: "Future[Any]", writer: SafetensorsWriter) -> None:
        self.target = target
        self._future, self._writer = future, writer
        future.add_done_callback(lambda _: writer.discard())

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Until it is written; raises CheckpointError, and leaves nothing half written, where it cannot be."""
        error = self._future.exception()
        self._writer.discard()
        if error is not None:
            raise reason(error, f"{self.target}: cannot be written") from None


def save_archive(target: Path, tree: Tree, files: Mapping[str, bytes], publish: Publish, *, spec_digest: str, peers: Peers) -> None:
    """Write `tree` and small files into a draft of `target`, which the first process publishes when all have written.

    Raises CheckpointError on every process, and leaves nothing half written, where a file cannot be written.
    """
    leaves, writer, planner = _prepared(target, tree, files, publish, spec_digest, peers)
    try:
        save(leaves, storage_writer=writer, planner=planner, process_group=peers.group, no_dist=peers.group is None)
    except (CheckpointException, RuntimeError) as error:
        raise reason(error, f"{target}: cannot be written") from None
    finally:
        writer.discard()


def save_archive_later(
    target: Path, tree: Tree, files: Mapping[str, bytes], publish: Publish, *, spec_digest: str, peers: Peers, buffers: HostBuffers
) -> Writing:
    """As `save_archive`, on a background thread: when this returns, `buffers` hold copies of all that is written."""
    leaves, writer, planner = _prepared(target, tree, files, publish, spec_digest, peers)
    alone = peers.group is None
    future = async_save(leaves, storage_writer=writer, planner=planner, process_group=peers.group, async_stager=buffers, no_dist=alone)
    assert isinstance(future, Future)
    return Writing(target, future, writer)


def _prepared(
    target: Path, tree: Tree, files: Mapping[str, bytes], publish: Publish, spec_digest: str, peers: Peers
) -> tuple[dict[str, Leaf], SafetensorsWriter, ShardSavePlanner]:
    _quiet()
    snapshot = flatten_tree(tree, rank=peers.rank, world_size=peers.world_size)
    extra = {"format": FORMAT, "spec_digest": spec_digest, "world_size": peers.world_size}
    writer = SafetensorsWriter(target, files, lambda draft, tensors: publish(draft, extra | tensors))
    return snapshot.leaves, writer, ShardSavePlanner(snapshot.parts)


def reason(error: BaseException, what: str) -> Exception:
    """What went wrong on the first process that failed.

    What the system refused, and a process that was lost, is a CheckpointError; all else is as it was raised.
    """
    if isinstance(error, CheckpointException):
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        return CheckpointError(f"{what} by process {rank}: {first}") if isinstance(first, OSError) else reason(first, what)
    if isinstance(error, distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error)):
        return CheckpointError(f"{what}: another process is gone ({str(error).splitlines()[0]})")
    return error if isinstance(error, Exception) else CheckpointError(f"{what}: it was stopped ({error!r})")


def check_manifest(directory: Path, extra: Mapping[str, Any], spec_digest: str) -> None:
    """Raise CheckpointError for a manifest of another format or another spec."""
    if extra.get("format") in OLDER:
        raise CheckpointError(
            f"{directory}: is of the older format {extra['format']!r}, this version reads {FORMAT!r}: go on with the version that wrote it"
        )
    if extra.get("format") != FORMAT:
        raise CheckpointError(f"{directory}: has format {extra.get('format')!r}, {FORMAT!r} is needed")
    if extra.get("spec_digest") != spec_digest:
        raise CheckpointError(f"{directory}: was made with spec {extra.get('spec_digest')}, this run's spec is {spec_digest}")


def _quiet() -> None:
    """One process without a process group is what was meant. For the whole process: the background thread saves by these filters too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized", category=UserWarning)
