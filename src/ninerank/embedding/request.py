"""The lookup of a served request: from a batch's ids to the inputs of a compiled graph, a few calls outside the interpreter's lock.

It gives what `EmbeddingCollection.sides` gives. That one is made of operators that train and that run on any device, each with its share
of Python; a request feels it, and threads that serve wait for each other in it. Here all that does not depend on the request is
worked out once, and a compiled kernel does the rest, a call a side and group.

Shape legend: R rows of a block (U requests or B candidates), Fs pooled fields, L sequence length, D embedding dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ninerank.embedding.collection import EmbeddingCollection
from ninerank.embedding.quantize import CODE_BITS, QuantizedGroup
from ninerank.embedding.rows import SideRows
from ninerank.embedding.table import TableGroup
from ninerank.errors import DataError
from ninerank.features.batch import Batch, Block
from ninerank.features.spec import Side
from ninerank.fusion.kernels.jit import as_numpy
from ninerank.fusion.kernels.request_rows import ALL_IDS_VALID, request_rows
from ninerank.fusion.roles import USER_ROW

__all__ = ["RequestLookup"]

Ints = npt.NDArray[np.int64]
NO_IDS: Ints = np.zeros(0, np.int64)
NO_MASK: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
NO_NUMBERS: npt.NDArray[np.float32] = np.zeros(0, np.float32)


@dataclass(frozen=True)
class _Group:
    """Storage of one group as kernels read it, flat."""

    name: str
    dim: int
    dtype: torch.dtype
    bits: int
    storage: npt.NDArray[Any]
    numbers: npt.NDArray[np.float32]

    @classmethod
    def of(cls, name: str, group: TableGroup) -> "_Group":
        storage = group.storage.detach()
        bits = CODE_BITS.get(group.dtype, 0) if isinstance(group, QuantizedGroup) else 0
        numbers = as_numpy(storage.view(torch.float32).view(-1)) if bits and storage.numel() else NO_NUMBERS
        return cls(name, group.dim, storage.dtype, bits, as_numpy(storage.view(-1)), numbers)


class _SidePlan:
    """Features of one side: where their tables lie, how bags are pooled, how long sequences may be."""

    def __init__(self, side: Side, rows: SideRows) -> None:
        self.side, self.rows = side, rows
        kinds = (rows.single, rows.bags, rows.sequences)
        self.tables = np.ascontiguousarray([(place.start, place.stop - place.start) for kind in kinds for place in kind.slices], np.int64)
        self.tables = self.tables.reshape(-1, 2)
        self.num_fields = len(rows.single.keys) + len(rows.bags.keys)
        self.is_mean = np.array(rows.is_mean, np.bool_)
        self.sequences = rows.sequences.keys
        self.greatest = np.array(rows.max_lengths, np.int64)

    def widths(self, block: Block, pad_to_max: bool) -> Ints:
        """Padded length of each sequence: at least one place, so that a batch of empty histories has a shape that graphs can take."""
        lengths = block.sequences.lengths
        if pad_to_max or lengths is None or block.num_rows == 0:
            return self.greatest if pad_to_max else np.ones_like(self.greatest)
        longest: Ints = lengths.numpy().reshape(len(self.sequences), block.num_rows).max(1)
        return np.maximum(longest, 1)


class RequestLookup:
    """Inputs of a compiled graph for batches on the host. Any number of threads may use it; the collection is only read.

    collection: all tables static, on the CPU (`takes`); the storages are shared, so that rows written in place are seen.
    dtypes: type of single inputs, bfloat16 for those that the graph rounds to it anyway (`fusion.backends.Runner.dtypes`); others are
    float32.
    """

    def __init__(self, collection: EmbeddingCollection, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        if not self.takes(collection):
            raise ValueError("a request is looked up in static tables on the CPU")
        self._pad_to_max = collection.config.padding == "max"
        self._groups = [_Group.of(name, group) for name, group in collection.named_groups()]
        part = collection.static
        self._sides: dict[Side, _SidePlan] = {"request": _SidePlan("request", part.request), "item": _SidePlan("item", part.item)}
        self._dtypes = dict(dtypes or {})
        self._kernels = {(plan.side, group.name): self._kernel(plan, group) for plan in self._sides.values() for group in self._groups}

    @staticmethod
    def takes(collection: EmbeddingCollection) -> bool:
        """Whether all tables are static and lie on the CPU."""
        return not collection.managed and all(group.storage.device.type == "cpu" for _, group in collection.named_groups())

    def sides(self, batch: Batch) -> dict[str, Tensor]:
        """What `EmbeddingCollection.sides` gives; without gradients. Raises DataError for ids and histories that do not fit."""
        row_B = batch.user_row_B
        request, item = self.side("request", batch.request), self.side("item", batch.item)
        return {**request, **item, USER_ROW: torch.arange(batch.num_rows) if row_B is None else row_B}

    def side(self, side: Side, block: Block) -> dict[str, Tensor]:
        """The inputs of one side. Raises DataError for ids and histories that do not fit."""
        plan = self._sides[side]
        inputs = {f"dense.{side}": block.dense_RF}
        if not self._look_up(plan, block, inputs):
            plan.rows.check(block)
            raise DataError(f"{side} features: ids do not fit their tables")
        return inputs

    def _kernel(self, plan: _SidePlan, group: _Group) -> tuple[Any, torch.dtype]:
        names = [f"{group.name}.{plan.side}", *(f"{group.name}.seq.{key}" for key in plan.sequences)]
        # One call writes one type: fields and sequences of a side are rounded together or not at all.
        is_narrow = all(self._dtypes.get(name) == torch.bfloat16 for name in names if not (name == names[0] and plan.num_fields == 0))
        dtype = torch.bfloat16 if is_narrow else torch.float32
        return request_rows(group.dim, group.dtype, group.bits, dtype), dtype

    def _look_up(self, plan: _SidePlan, block: Block, inputs: dict[str, Tensor]) -> bool:
        """Add this side's inputs; whether all ids were found."""
        count = block.num_rows
        single, bags, sequences = block.single, block.bags, block.sequences
        lengths = [NO_IDS if part.lengths is None else part.lengths.numpy() for part in (bags, sequences)]
        ids = (count, single.values.numpy(), bags.values.numpy(), lengths[0], sequences.values.numpy(), lengths[1])
        widths, masks, places = NO_IDS, NO_MASK, 0
        if plan.sequences:
            widths = plan.widths(block, self._pad_to_max)
            places = count * int(widths.sum())
            mask = torch.empty(places, dtype=torch.bool)
            masks = mask.numpy()
            self._split("mask", plan, widths, count, mask, inputs)
        for group in self._groups:
            kernel, dtype = self._kernels[plan.side, group.name]
            fields = torch.empty((count, plan.num_fields, group.dim), dtype=dtype)
            padded = torch.empty((places, group.dim), dtype=dtype)
            found = kernel(
                *(group.storage, group.numbers, plan.tables, plan.is_mean, *ids, widths),
                *(as_numpy(fields.view(-1)), as_numpy(padded.view(-1)), masks),
            )
            if found != ALL_IDS_VALID:
                return False
            masks = NO_MASK
            inputs[f"{group.name}.{plan.side}"] = fields
            if plan.sequences:
                self._split(f"{group.name}.seq", plan, widths, count, padded, inputs)
        return True

    def _split(self, name: str, plan: _SidePlan, widths: Ints, count: int, flat: Tensor, inputs: dict[str, Tensor]) -> None:
        """Add the parts of `flat`, one a sequence, (R, L) or (R, L, D)."""
        first = 0
        for key, width in zip(plan.sequences, widths.tolist(), strict=True):
            inputs[f"{name}.{key}"] = flat[first : first + count * width].view(count, width, *flat.shape[1:])
            first += count * width
