"""Transformed rows of a split, packed in memory, from which any rows can be taken as a batch.

Shape legend: R rows, F features of a block, T labels, n rows taken, nnz ids in all.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ninerank.features.batch import Batch, Block, KeyedJagged

__all__ = ["PackedRows", "batch_bytes"]

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class _Column:
    """Ids of one jagged feature: row r holds values[offsets[r]:offsets[r + 1]]."""

    values: Tensor
    offsets: Tensor

    def take(self, row_n: Tensor) -> tuple[Tensor, Tensor]:
        """Values and lengths of the rows, in their order."""
        start_n = self.offsets[row_n]
        length_n = self.offsets[row_n + 1] - start_n
        first_n = length_n.cumsum(0) - length_n
        position = torch.arange(int(length_n.sum())) + (start_n - first_n).repeat_interleave(length_n)
        return self.values[position].long(), length_n


@dataclass(frozen=True)
class _PackedIds:
    """Either one id a row and feature, as a matrix with rows together, or one `_Column` a feature."""

    keys: tuple[str, ...]
    ids_RF: Tensor | None
    columns: tuple[_Column, ...]

    @classmethod
    def of(cls, parts: Sequence[KeyedJagged]) -> "_PackedIds":
        keys = parts[0].keys
        if all(part.lengths is None for part in parts):
            return cls(keys, _narrow(torch.cat([part.values.view(len(keys), part.num_rows).t() for part in parts]).contiguous()), ())
        by_part = [dict(part.items()) for part in parts]
        columns = []
        for key in keys:
            lengths = torch.cat([part[key].lengths for part in by_part])
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            columns.append(_Column(_narrow(torch.cat([part[key].values for part in by_part])), offsets))
        return cls(keys, None, tuple(columns))

    def take(self, row_n: Tensor) -> KeyedJagged:
        if self.ids_RF is not None:
            return KeyedJagged(self.keys, self.ids_RF[row_n].t().long().reshape(-1), None, row_n.numel())
        taken = [column.take(row_n) for column in self.columns]
        empty = torch.empty(0, dtype=torch.int64)
        values, lengths = torch.cat([empty, *(v for v, _ in taken)]), torch.cat([empty, *(length for _, length in taken)])
        return KeyedJagged(self.keys, values, lengths, row_n.numel())

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.ids_RF, *(t for c in self.columns for t in (c.values, c.offsets))) if t is not None]


@dataclass(frozen=True)
class _PackedBlock:
    single: _PackedIds
    bags: _PackedIds
    sequences: _PackedIds
    dense_RF: Tensor

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> "_PackedBlock":
        return cls(
            _PackedIds.of([block.single for block in blocks]),
            _PackedIds.of([block.bags for block in blocks]),
            _PackedIds.of([block.sequences for block in blocks]),
            torch.cat([block.dense_RF for block in blocks]),
        )

    def take(self, row_n: Tensor) -> Block:
        return Block(self.single.take(row_n), self.bags.take(row_n), self.sequences.take(row_n), self.dense_RF[row_n])

    def tensors(self) -> list[Tensor]:
        return [*self.single.tensors(), *self.bags.tensors(), *self.sequences.tensors(), self.dense_RF]


@dataclass(frozen=True)
class PackedRows:
    """All rows of a split in file order; ids that fit are held as int32."""

    request: _PackedBlock
    item: _PackedBlock
    label_RT: Tensor | None
    weight_R: Tensor | None
    group_R: Tensor | None

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "PackedRows":
        """Pack training batches (one request row a row) that the same transform made; at least one."""
        return cls(
            _PackedBlock.of([batch.request for batch in batches]),
            _PackedBlock.of([batch.item for batch in batches]),
            _joined([batch.label_BT for batch in batches]),
            _joined([batch.weight_B for batch in batches]),
            _joined([batch.group_B for batch in batches]),
        )

    @classmethod
    def within(cls, batches: Iterable[Batch], limit_bytes: int, on_rows: Callable[[int], None] = lambda _: None) -> "PackedRows | None":
        """Pack what the iterable yields, or None as soon as it takes more than `limit_bytes` (before int32 halves it)."""
        held, size = [], 0
        for batch in batches:
            size += batch_bytes(batch)
            if size > limit_bytes:
                return None
            held.append(batch)
            on_rows(batch.num_rows)
        return cls.of(held) if held else None

    @property
    def num_rows(self) -> int:
        return self.item.dense_RF.shape[0]

    @property
    def num_bytes(self) -> int:
        optional = [t for t in (self.label_RT, self.weight_R, self.group_R) if t is not None]
        return sum(t.numel() * t.element_size() for t in (*self.request.tensors(), *self.item.tensors(), *optional))

    def take(self, row_n: Tensor) -> Batch:
        """Rows `row_n` (int64) as one batch, in that order."""
        label, weight, group = (None if t is None else t[row_n] for t in (self.label_RT, self.weight_R, self.group_R))
        return Batch(self.request.take(row_n), self.item.take(row_n), label_BT=label, weight_B=weight, group_B=group)


def batch_bytes(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    tensors = [batch.label_BT, batch.weight_B, batch.group_B]
    for block in (batch.request, batch.item):
        tensors.append(block.dense_RF)
        for ids in (block.single, block.bags, block.sequences):
            tensors += [ids.values, ids.lengths]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _narrow(ids: Tensor) -> Tensor:
    if ids.numel() == 0:
        return ids
    low, high = ids.aminmax()
    return ids.int() if int(low) >= -INT32_MAX and int(high) <= INT32_MAX else ids
