"""Where each id of a batch lies in the merged storage, and how the looked-up rows become fields and sequences.

The index of a batch is worked out once and serves every group, since all groups hold the same tables at the same row offsets.

Shape legend: B scored rows, R rows of a block (B, or the requests of a rank call), F features of one kind on one side,
N ids, M bags, L sequence length, D embedding dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ninerank.embedding.table import TableLayout
from ninerank.errors import DataError
from ninerank.features.batch import Batch, Block, KeyedJagged

__all__ = ["BatchIndex", "KeyRows", "SideRows", "pool_rows"]


class KeyRows(nn.Module):
    """Row offset and size of the table behind each feature of one kind on one side."""

    offset_F: Tensor
    size_F: Tensor

    def __init__(self, layout: TableLayout, tables: Mapping[str, str]) -> None:
        super().__init__()
        self.keys = tuple(tables)
        self.tables = tuple(tables.values())
        slices = [layout.rows_of(table) for table in self.tables]
        self.register_buffer("offset_F", torch.tensor([s.start for s in slices], dtype=torch.int64), persistent=False)
        self.register_buffer("size_F", torch.tensor([s.stop - s.start for s in slices], dtype=torch.int64), persistent=False)

    def single(self, ids: KeyedJagged) -> Tensor:
        """Storage rows (F, R) of features with exactly one id a row."""
        return ids.values.view(len(self.keys), ids.num_rows) + self.offset_F[:, None]

    def jagged(self, ids: KeyedJagged) -> Tensor:
        """Storage rows (N,) of features with any number of ids a row."""
        return ids.values + self._per_id(self.offset_F, ids)

    def check(self, ids: KeyedJagged) -> None:
        """Raise DataError for features other than the spec's, or an id outside its table."""
        if ids.keys != self.keys:
            raise DataError(f"batch holds the features {list(ids.keys)}, this model takes {list(self.keys)} here")
        if ids.values.numel() == 0:
            return
        if ids.lengths is None:
            low_F, high_F = ids.values.view(len(self.keys), ids.num_rows).aminmax(dim=1)
            if bool(((low_F < 0) | (high_F >= self.size_F)).any()):
                self._refuse(ids, self.size_F.repeat_interleave(ids.num_rows))
        else:
            size_N = self._per_id(self.size_F, ids)
            if bool(((ids.values < 0) | (ids.values >= size_N)).any()):
                self._refuse(ids, size_N)

    def _refuse(self, ids: KeyedJagged, size_N: Tensor) -> None:
        place = int(((ids.values < 0) | (ids.values >= size_N)).nonzero()[0, 0])
        feature = int(self._per_id(torch.arange(len(self.keys)), ids)[place])
        raise DataError(
            f"feature {self.keys[feature]!r}: id {int(ids.values[place])} is outside table {self.tables[feature]!r} "
            f"of {int(size_N[place])} rows (valid: 0 to {int(size_N[place]) - 1})"
        )

    def _per_id(self, value_F: Tensor, ids: KeyedJagged) -> Tensor:
        """One value per feature, repeated for each of its ids."""
        if ids.lengths is None:
            return value_F.repeat_interleave(ids.num_rows)
        count_F = ids.lengths.view(len(self.keys), ids.num_rows).sum(1)
        return value_F.repeat_interleave(count_F, output_size=ids.values.numel())


class SideRows(nn.Module):
    """The features of one side: single ids, bags with their pooling, sequences with their greatest length."""

    is_mean_F: Tensor

    def __init__(
        self,
        layout: TableLayout,
        single: Mapping[str, str],
        bags: Mapping[str, str],
        sequences: Mapping[str, str],
        *,
        mean_bags: Sequence[str] = (),
        max_lengths: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.single = KeyRows(layout, single)
        self.bags = KeyRows(layout, bags)
        self.sequences = KeyRows(layout, sequences)
        self.max_lengths = dict(max_lengths or {})
        self.has_mean = bool(mean_bags)
        self.register_buffer("is_mean_F", torch.tensor([key in mean_bags for key in bags], dtype=torch.bool), persistent=False)

    def check(self, block: Block) -> None:
        """Raise DataError for ids or features that do not fit this side."""
        self.single.check(block.single)
        self.bags.check(block.bags)
        self.sequences.check(block.sequences)

    def bag_scale(self, ids: KeyedJagged) -> Tensor | None:
        """1 / length for bags pooled by mean, 1 for sums, (F * R, 1); None where all bags are summed."""
        if not self.has_mean:
            return None
        length_M = lengths_of(ids)
        mean_M = self.is_mean_F.repeat_interleave(ids.num_rows)
        return torch.where(mean_M, length_M.clamp(min=1), torch.ones_like(length_M)).to(torch.float32).reciprocal()[:, None]


def lengths_of(ids: KeyedJagged) -> Tensor:
    """Lengths (F * R,), written out where every row holds one id."""
    return torch.ones_like(ids.values) if ids.lengths is None else ids.lengths


class _PoolRows(torch.autograd.Function):
    """Sum of consecutive rows; the backward is a gather, so that no device needs a scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, offsets: Tensor, bag_N: Tensor) -> Tensor:
        ctx.save_for_backward(bag_N)
        each = torch.arange(rows_ND.shape[0], device=rows_ND.device)
        return functional.embedding_bag(each, rows_ND, offsets, mode="sum", include_last_offset=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        return grad_MD.index_select(0, ctx.saved_tensors[0]), None, None


def pool_rows(rows_ND: Tensor, lengths_M: Tensor) -> Tensor:
    """Sum (M, D) of each bag's rows, which lie one bag after the other; zeros for an empty bag.

    >>> pool_rows(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([2, 0, 1])).tolist()
    [[3.0], [0.0], [4.0]]
    """
    offsets = torch.cat([lengths_M.new_zeros(1), lengths_M.cumsum(0)])
    bag_N = torch.arange(lengths_M.numel(), device=lengths_M.device).repeat_interleave(lengths_M, output_size=rows_ND.shape[0])
    return cast("Tensor", _PoolRows.apply(rows_ND, offsets, bag_N))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Sequence:
    """One sequence feature: its ids lie at `place_N` of a zero-padded (R * L) array."""

    name: str
    place_N: Tensor
    mask_RL: Tensor


class BatchIndex:
    """Storage rows of all ids of a batch in one vector, and the way back from looked-up rows to fields.

    Order: single ids of both sides row by row (side by side for one row where both sides have the same rows), then request
    bags, item bags, request sequences, item sequences.
    """

    def __init__(self, request: SideRows, item: SideRows, batch: Batch, *, pad_to_max: bool) -> None:
        self.sides = ((request, batch.request), (item, batch.item))
        self.user_row_B = batch.user_row_B
        self.joint = batch.user_row_B is None
        single = [side.single.single(block.single) for side, block in self.sides]
        if self.joint:
            single = [torch.cat(single)]
        parts = [row_FR.t().reshape(-1) for row_FR in single]
        parts += [side.bags.jagged(block.bags) for side, block in self.sides]
        parts += [side.sequences.jagged(block.sequences) for side, block in self.sides]
        self._sizes = [part.numel() for part in parts]
        self.row_N = torch.cat(parts)
        self._sequences = [list(_sequences(side, block, pad_to_max)) for side, block in self.sides]

    def fields(self, rows_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pooled fields (B, Fs, D) and each sequence's rows (B, L, D), zero beyond its end."""
        parts = self._parts(rows_ND)
        single, bag_parts, sequence_parts = parts[:-4], parts[-4:-2], parts[-2:]
        return self._fields(single, bag_parts, rows_ND.shape[1]), self._padded(sequence_parts)

    def _parts(self, rows_ND: Tensor) -> list[Tensor]:
        if sum(size > 0 for size in self._sizes) > 1:
            return list(torch.split_with_sizes(rows_ND, self._sizes))
        # One part holds all rows: a split would copy them in its backward.
        return [rows_ND if size else rows_ND[:0] for size in self._sizes]

    def _fields(self, single: list[Tensor], bag_parts: list[Tensor], dim: int) -> Tensor:
        counts = [len(side.single.keys) for side, _ in self.sides]
        bags = [self._pooled(side, block, part) for (side, block), part in zip(self.sides, bag_parts, strict=True)]
        if self.joint:
            single_BFD = single[0].view(self.sides[0][1].num_rows, sum(counts), dim)
            if not any(bag.shape[1] for bag in bags):
                return single_BFD
            request, item = torch.split_with_sizes(single_BFD, counts, dim=1)
        else:
            request, item = (part.view(block.num_rows, n, dim) for part, n, (_, block) in zip(single, counts, self.sides, strict=True))
        return torch.cat([self._expanded(torch.cat([request, bags[0]], dim=1)), item, bags[1]], dim=1)

    def _padded(self, parts: list[Tensor]) -> dict[str, Tensor]:
        padded: dict[str, Tensor] = {}
        for is_item, (sequences, part) in enumerate(zip(self._sequences, parts, strict=True)):
            own = torch.split_with_sizes(part, [sequence.place_N.numel() for sequence in sequences])
            for sequence, rows in zip(sequences, own, strict=True):
                flat = rows.new_zeros(sequence.mask_RL.numel(), rows.shape[1]).index_copy(0, sequence.place_N, rows)
                rows_RLD = flat.view(*sequence.mask_RL.shape, rows.shape[1])
                padded[sequence.name] = rows_RLD if is_item else self._expanded(rows_RLD)
        return padded

    def masks(self) -> dict[str, Tensor]:
        """Which places (B, L) of each sequence hold an id."""
        request, item = self._sequences
        return {s.name: self._expanded(s.mask_RL) for s in request} | {s.name: s.mask_RL for s in item}

    def _pooled(self, side: SideRows, block: Block, rows_ND: Tensor) -> Tensor:
        count, dim = len(side.bags.keys), rows_ND.shape[1]
        if count == 0:
            return rows_ND.new_empty(block.num_rows, 0, dim)
        pooled_MD = pool_rows(rows_ND, lengths_of(block.bags))
        scale_M1 = side.bag_scale(block.bags)
        if scale_M1 is not None:
            pooled_MD = pooled_MD * scale_M1
        return pooled_MD.view(count, block.num_rows, dim).transpose(0, 1)

    def _expanded(self, tensor: Tensor) -> Tensor:
        """Request rows repeated for each candidate, as late as can be."""
        return tensor if self.user_row_B is None else tensor.index_select(0, self.user_row_B)


def _sequences(side: SideRows, block: Block, pad_to_max: bool) -> Iterator[_Sequence]:
    rows = block.num_rows
    if not side.sequences.keys:
        return
    length_FR = lengths_of(block.sequences).view(len(side.sequences.keys), rows)
    longest_F = length_FR.amax(1).tolist() if rows else [0] * len(side.sequences.keys)
    for key, length_R, longest in zip(side.sequences.keys, length_FR, longest_F, strict=True):
        greatest = side.max_lengths[key]
        if longest > greatest:
            raise DataError(f"sequence {key!r}: {longest} ids in a row, at most {greatest}")
        width = greatest if pad_to_max else max(1, longest)
        mask_RL = torch.arange(width, device=length_R.device) < length_R[:, None]
        yield _Sequence(key, mask_RL.view(-1).nonzero().view(-1), mask_RL)
