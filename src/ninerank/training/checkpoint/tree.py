"""What may be saved: nested dictionaries whose leaves are tensors, shards of tensors, tables by id, or what is each process's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ninerank.embedding.dynamic.state import shard_of
from ninerank.embedding.shard import Shard

__all__ = ["ById", "Leaf", "Part", "PerProcess", "Snapshot", "Tree", "flatten_tree", "part_key"]


@dataclass(frozen=True)
class ById:
    """Ids of a dynamic table that this process holds, and their columns: what `DynamicTable.state()` gives.

    The tensors belong to the save from then on: an asynchronous one does not copy them first. A table that has a row for each id there
    can be is saved as plain tensors.
    """

    state: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if "id" not in self.state:
            raise ValueError(f"a table by id needs a column 'id'; there are: {', '.join(self.state) or 'none'}")


@dataclass(frozen=True)
class PerProcess:
    """Tensors that every process has for itself, such as the states of its random generators. They belong to the save from then on."""

    tensors: Mapping[str, Tensor]


Tree: TypeAlias = "Mapping[str, Tree | Tensor | Shard | Sequence[Shard] | ById | PerProcess]"


@dataclass(frozen=True)
class Leaf:
    """Blocks of one tensor that this process writes or reads. is_own: nobody else will change them, so that they need no copy."""

    shards: tuple[Shard, ...]
    is_own: bool = False


@dataclass(frozen=True)
class Part:
    """One process's share of a leaf that is kept apart by process.

    kind: `by_id` or `per_process`. is_dealt: of a table by id, whether all ids are those that `shard_of` gives this process.
    """

    kind: str
    columns: tuple[str, ...]
    is_dealt: bool = False


@dataclass(frozen=True)
class Snapshot:
    """A tree as flat as files are: blocks by full name, and which leaves are kept apart by process."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)


def part_key(name: str, rank: int, column: str) -> str:
    """Full name of one process's own tensor.

    >>> part_key("model.item", 3, "value.deep")
    'model.item[3].value.deep'
    """
    return f"{name}[{rank}].{column}"


def flatten_tree(tree: Tree, *, rank: int, world_size: int, prefix: str = "") -> Snapshot:
    """Blocks of a tree, keys joined by dots. A plain tensor is the same on every process: the first alone names it.

    Raises ValueError for two leaves of one name, TypeError for anything else than what `Tree` lists.
    """
    snapshot = Snapshot()
    _flatten(tree, prefix, rank, world_size, snapshot)
    return snapshot


def _flatten(node: Any, name: str, rank: int, world_size: int, snapshot: Snapshot) -> None:
    if isinstance(node, Mapping):
        for key, inner in node.items():
            _flatten(inner, f"{name}.{key}" if name else key, rank, world_size, snapshot)
    elif isinstance(node, ById | PerProcess):
        tensors = node.state if isinstance(node, ById) else node.tensors
        is_dealt = isinstance(node, ById) and all(
            _is_dealt(tensors[key], rank, world_size) for key in ("id", "pending.id") if key in tensors
        )
        kind = "by_id" if isinstance(node, ById) else "per_process"
        _enter(snapshot.parts, name, Part(kind, tuple(sorted(tensors)), is_dealt))
        for column, tensor in tensors.items():
            _enter(snapshot.leaves, part_key(name, rank, column), Leaf((whole(tensor),), is_own=True))
    elif isinstance(node, Tensor):
        if rank == 0:
            _enter(snapshot.leaves, name, Leaf((whole(node),)))
    else:
        # A block without elements would share its place with the block that begins there.
        shards = [shard for shard in blocks_of(node, name) if shard.tensor.numel() or shard.is_whole]
        if shards:
            _enter(snapshot.leaves, name, Leaf(tuple(shards)))


def _enter(entries: dict[str, Any], name: str, value: object) -> None:
    if name in entries:
        raise ValueError(f"two entries of a checkpoint are named {name!r}")
    entries[name] = value


def _is_dealt(ids: Tensor, rank: int, world_size: int) -> bool:
    return world_size == 1 or bool(np.all(shard_of(ids.numpy(), world_size) == rank))


def whole(tensor: Tensor) -> Shard:
    """The one block of a tensor that is not divided."""
    return Shard(tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach())


def blocks_of(node: object, name: str) -> Sequence[Shard]:
    """The blocks of a leaf that is a tensor, a shard, or several of one tensor."""
    if isinstance(node, Tensor):
        return (whole(node),)
    shards = (node,) if isinstance(node, Shard) else node
    if isinstance(shards, Sequence) and all(isinstance(shard, Shard) for shard in shards):
        return tuple(shards)
    raise TypeError(f"{name}: {type(node).__name__} has no place in a checkpoint")
