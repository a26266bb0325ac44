"""State of a dynamic table by raw id: what a checkpoint holds, and how it is dealt out to another number of processes.

    id (n,) int64, rising         last_seen (n,) int64          count (n,) int64
    value.<group> (n, D) float32  state.<group>.<name> (n, W) float32
    pending.*                     what the admission policy holds: exact counts by id, or the counters of a Bloom filter

Row numbers are not in it. n ids with a row, D embedding dim, W width of an optimizer state.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.dynamic.native import mix64, share, stream_key
from ninerank.errors import CheckpointError
from ninerank.features.native import jit

__all__ = ["check_state", "own_shard", "reshard", "shard_of"]

COUNTERS = "pending.counters"
GREATEST_COUNTER = 255
SHARD_KEY = stream_key("shard")


def check_state(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], table: str) -> None:
    """Raise CheckpointError unless `state` holds the `wanted` columns (dtype, shape of one row) for distinct ids in rising order."""
    rows = {key for key in state if not key.startswith("pending.")}
    for key in sorted(rows ^ wanted.keys()):
        where = "is missing" if key in wanted else "is not of this table"
        raise CheckpointError(f"dynamic table {table!r}: {key!r} {where}; needed: {', '.join(wanted)}")
    count = state["id"].shape[0] if state["id"].ndim else 0
    for key, (dtype, shape) in wanted.items():
        value = state[key]
        if value.dtype != dtype or tuple(value.shape) != (count, *shape):
            raise CheckpointError(
                f"dynamic table {table!r}: {key!r} is {value.dtype} {tuple(value.shape)}, {dtype} {(count, *shape)} is needed"
            )
    if bool((state["id"][1:] <= state["id"][:-1]).any()):
        raise CheckpointError(f"dynamic table {table!r}: ids must be distinct and in rising order")
    if count and not 1 <= int(state["count"].min()) <= int(state["count"].max()) < 1 << 32:
        raise CheckpointError(f"dynamic table {table!r}: a count is outside 1 ... {(1 << 32) - 1}")


@jit
def _shards(ids, key, world_size, out):  # type: ignore[no-untyped-def]
    for i in range(ids.shape[0]):
        out[i] = share(mix64(np.uint64(ids[i]) ^ key), world_size)


def shard_of(ids: Ints, world_size: int) -> Ints:
    """Which of `world_size` processes owns each id: a fixed hash, even whatever the ids are."""
    out = np.empty(len(ids), np.int64)
    _shards(np.ascontiguousarray(ids), SHARD_KEY, world_size, out)
    return out


def reshard(states: Sequence[Mapping[str, Tensor]], world_size: int) -> list[dict[str, Tensor]]:
    """Deal the states of N processes out to `world_size` ones, each id to its owner by `shard_of`.

    The counters of Bloom filters are added up and given to all: an id's estimate stays an upper bound of its count. Raises
    CheckpointError for states of different tables, or an id that two of them hold.
    """
    if not states:
        raise CheckpointError("no state to deal out: at least one is needed")
    return [own_shard(states, rank, world_size) for rank in range(world_size)]


def own_shard(states: Sequence[Mapping[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """What `reshard` deals out to process `rank`, without the shards of the others.

    A column is asked for once in each state, one after the other, the ids first: states may read theirs from files at that moment.
    """
    for state in states:
        if state.keys() != states[0].keys():
            raise CheckpointError(f"states of different tables: {sorted(states[0])} and {sorted(state)}")
    shard: dict[str, Tensor] = {}
    for id_key, keys in _families(states[0]).items():
        held = [state[id_key] for state in states]
        places = [torch.from_numpy(np.flatnonzero(shard_of(ids.numpy(), world_size) == rank)) for ids in held]
        ids, order = torch.cat([ids[place] for ids, place in zip(held, places, strict=True)]).sort()
        if bool((ids.diff() == 0).any()):
            twice = int(ids[1:][ids.diff() == 0][0])
            raise CheckpointError(f"id {twice} is held by two of the {len(states)} states: each id has one owner")
        shard[id_key] = ids
        for key in keys:
            if key != id_key:
                shard[key] = torch.cat([state[key][place] for state, place in zip(states, places, strict=True)])[order]
    if COUNTERS in states[0]:
        shard[COUNTERS] = _added([state[COUNTERS] for state in states])
    return shard


def _families(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Columns by the id column that they belong to."""
    families = {"id": [key for key in state if not key.startswith("pending.")]}
    if "pending.id" in state:
        families["pending.id"] = ["pending.id", "pending.count"]
    return families


def _added(counters: Sequence[Tensor]) -> Tensor:
    total: npt.NDArray[np.uint16] = np.zeros(counters[0].shape, np.uint16)
    for part in counters:
        if part.shape != counters[0].shape:
            raise CheckpointError(f"{COUNTERS}: {tuple(part.shape)} beside {tuple(counters[0].shape)}: the filters differ in size")
        np.minimum(total + part.numpy(), GREATEST_COUNTER, out=total)
    return torch.from_numpy(total.astype(np.uint8))
