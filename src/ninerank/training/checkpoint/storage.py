"""Files and manifest: where `torch.distributed.checkpoint` puts blocks, and where it finds them again.

Each process writes `rank-<r>.safetensors` into a draft beside the checkpoint's place. When all have, the coordinator adds the state and the
manifest and renames. `extra.tensors` of the manifest:

    name -> {"dtype": "F32", "shape": [...], "blocks": [{"offsets": [...], "sizes": [...], "file": ..., "key": ...}, ...]}

and `extra.parts`: name -> {"kind": ..., "ranks": {"0": {"columns": [...], "is_dealt": ...}, ...}} of what is kept apart by process.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ninerank.training import sealed
from ninerank.training.checkpoint.tensorfile import DTYPES, TORCH_DTYPES, Content, opened, write_tensors

__all__ = ["SafetensorsReader", "SafetensorsWriter", "tensors_metadata"]

READ_BYTES = 1 << 26  # a block is copied in pieces of this size, so that reading needs little memory beside the target


@dataclass(frozen=True)
class _Place:
    """Where a block was written: file and key in it, with the file's digest and size."""

    file: str
    key: str
    sha256: str
    num_bytes: int


class SafetensorsWriter(StorageWriter):
    """Writes one checkpoint into a draft of `target`.

    files: small files beside the tensors. publish: makes the draft the checkpoint, given what its manifest is to say of the tensors.
    """

    def __init__(self, target: Path, files: Mapping[str, bytes], publish: Callable[[sealed.Draft, dict[str, Any]], None]) -> None:
        self.target, self.files, self.publish = target, files, publish
        self.draft: sealed.Draft | None = None
        self.rank = 0

    def reset(self, checkpoint_id: object = None) -> None:
        """A writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.draft = sealed.Draft(self.target)
        return [replace(plan, storage_data=str(self.draft.path)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            name = f"rank-{self.rank}.safetensors"
            items = {_key(item): item for item in plan.items}
            digest, size = write_tensors(Path(plan.storage_data, name), {key: _content(item, planner) for key, item in items.items()})
            places = ((item.index, _Place(name, key, digest, size)) for key, item in items.items())
            results = [WriteResult(index, size_in_bytes=size, storage_data=place) for index, place in places]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self.draft is not None
        places = {result.index: result.storage_data for part in results for result in part}
        for file, digest, size in sorted({(place.file, place.sha256, place.num_bytes) for place in places.values()}):
            self.draft.enter(file, digest, size)
        for name, data in self.files.items():
            self.draft.add(name, data)
        self.publish(self.draft, {"tensors": _tensors_json(metadata, places), "parts": _parts_json(metadata)})
        self.draft = None

    def discard(self) -> None:
        """Delete the draft of a checkpoint that did not come to its end."""
        if self.draft is not None:
            self.draft.discard()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return True


class SafetensorsReader(StorageReader):
    """Reads blocks of the files of a checkpoint that was verified. paths: of its files, by name. tensors: what the manifest says."""

    def __init__(self, paths: Mapping[str, Path], tensors: Mapping[str, Any]) -> None:
        self.paths = paths
        self.metadata = tensors_metadata(tensors)
        self._places = {
            MetadataIndex(name, block["offsets"]): (block["file"], block["key"])
            for name, tensor in tensors.items()
            for block in tensor["blocks"]
        }

    def reset(self, checkpoint_id: object = None) -> None:
        """A reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The files were checked before."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            file, key = self._places[item.storage_index]
            by_file.setdefault(file, []).append((key, item))
        for file, wanted in by_file.items():
            with opened(self.paths[file]) as stream:
                for key, item in wanted:
                    target = planner.resolve_tensor(item).detach()
                    _copy(stream, key, item, target)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return True


def _copy(stream: Any, key: str, item: ReadItem, target: torch.Tensor) -> None:
    if not item.lengths:
        target.copy_(stream.get_tensor(key))
        return
    block = stream.get_slice(key)
    first, length = item.storage_offsets[0], item.lengths[0]
    rest = tuple(slice(start, start + size) for start, size in zip(item.storage_offsets[1:], item.lengths[1:], strict=True))
    step = max(1, READ_BYTES * length // max(1, target.nbytes))
    for row in range(0, length, step):
        stop = min(row + step, length)
        target[row:stop].copy_(block[(slice(first + row, first + stop), *rest)])


def _key(item: WriteItem) -> str:
    """A block's key in its file: the tensor's name, with the offsets where it is not the whole."""
    data = item.tensor_data
    assert data is not None
    is_whole = data.chunk.sizes == data.size
    return item.index.fqn if is_whole else f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"


def _content(item: WriteItem, planner: SavePlanner) -> Content:
    data = item.tensor_data
    assert data is not None

    def tensor() -> torch.Tensor:
        found = planner.resolve_data(item)
        assert isinstance(found, torch.Tensor)
        return found

    return Content(data.properties.dtype, tuple(data.chunk.sizes), tensor)


def _tensors_json(metadata: Metadata, places: Mapping[MetadataIndex, _Place]) -> dict[str, Any]:
    found = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        blocks = [
            {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": place.file, "key": place.key}
            for chunk in tensor.chunks
            for place in [places[MetadataIndex(name, chunk.offsets)]]
        ]
        found[name] = {"dtype": DTYPES[tensor.properties.dtype], "shape": list(tensor.size), "blocks": blocks}
    return found


def _parts_json(metadata: Metadata) -> dict[str, Any]:
    return {
        name: {
            "kind": next(iter(ranks.values())).kind,
            "ranks": {str(rank): {"columns": part.columns, "is_dealt": part.is_dealt} for rank, part in ranks.items()},
        }
        for name, ranks in metadata.planner_data.items()
    }


def tensors_metadata(tensors: Mapping[str, Any]) -> Metadata:
    """What the manifest says of tensors, in the form that load planners take."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=TORCH_DTYPES[tensor["dtype"]]),
                torch.Size(tensor["shape"]),
                [ChunkStorageMetadata(torch.Size(block["offsets"]), torch.Size(block["sizes"])) for block in tensor["blocks"]],
            )
            for name, tensor in tensors.items()
        }
    )
