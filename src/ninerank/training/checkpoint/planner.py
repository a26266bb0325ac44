"""Who writes and who reads which block: planners of `torch.distributed.checkpoint` for leaves made of shards."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ninerank.embedding.shard import Shard
from ninerank.errors import CheckpointError
from ninerank.training.checkpoint.tree import Leaf, Part

__all__ = ["ShardLoadPlanner", "ShardSavePlanner"]


class ShardSavePlanner(DefaultSavePlanner):
    """Every block is written by one of the processes that name it; those of one tensor must fill it and not overlap.

    The plan's metadata says of each leaf that is kept apart by process who has a part of it: name -> rank -> Part.
    """

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> SavePlan:
        leaves: dict[str, Leaf] = self.state_dict
        self.plan = SavePlan([_write_item(name, shard) for name, leaf in leaves.items() for shard in leaf.shards], planner_data=self.parts)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        for item in (item for plan in plans for item in plan.items):
            held, whole = item.tensor_data, metadata.state_dict_metadata[item.index.fqn]
            assert held is not None
            assert isinstance(whole, TensorStorageMetadata)
            if (held.size, held.properties.dtype) != (whole.size, whole.properties.dtype):
                raise ValueError(f"{item.index.fqn}: {held.properties.dtype} {held.size} and {whole.properties.dtype} {whole.size}")
        parts: dict[str, dict[int, Part]] = {}
        for rank, plan in enumerate(all_plans):
            for name, part in plan.planner_data.items():
                parts.setdefault(name, {})[rank] = part
        self.metadata = replace(metadata, planner_data=parts)
        return plans, self.metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return _find(self.state_dict[write_item.index.fqn], write_item.index).tensor


class ShardLoadPlanner(DefaultLoadPlanner):
    """Every block of the target is put together from whatever blocks the checkpoint has there. what: names it in errors."""

    def __init__(self, what: str) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.what = what

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, leaf in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise CheckpointError(f"{self.what}: does not fit the model of the recipe: it has no {name!r}")
            for shard in leaf.shards:
                self._check(name, shard, saved)
            found = create_read_items_for_chunk_list(name, saved, [_chunk(shard) for shard in leaf.shards])
            if sum(item.lengths.numel() for item in found) != sum(shard.tensor.numel() for shard in leaf.shards):
                raise CheckpointError(f"{self.what}: {name!r} has gaps: {len(saved.chunks)} blocks do not fill {tuple(saved.size)}")
            items += found
        return LoadPlan(items)

    def _check(self, name: str, shard: Shard, saved: TensorStorageMetadata) -> None:
        met = (saved.properties.dtype, tuple(saved.size))
        needed = (shard.tensor.dtype, shard.global_shape)
        if met != needed:
            raise CheckpointError(
                f"{self.what}: does not fit the model of the recipe: {name!r} is {met[0]} {met[1]}, {needed[0]} {needed[1]} is needed"
            )

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = _find(self.state_dict[read_item.dest_index.fqn], read_item.dest_index).tensor
        for dim, (first, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, first, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: what `resolve_tensor` gave is a view of the target."""


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(shard.offsets), sizes=shard.tensor.shape)


def _write_item(name: str, shard: Shard) -> WriteItem:
    properties = TensorProperties(dtype=shard.tensor.dtype)
    data = TensorWriteData(chunk=_chunk(shard), properties=properties, size=torch.Size(shard.global_shape))
    return WriteItem(index=MetadataIndex(name, shard.offsets), type=WriteItemType.SHARD, tensor_data=data)


def _find(leaf: Leaf, index: MetadataIndex) -> Shard:
    return next(shard for shard in leaf.shards if torch.Size(shard.offsets) == index.offset)
