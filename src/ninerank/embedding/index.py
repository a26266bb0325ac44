"""Where each id of a batch lies in the merged storage, and how the looked-up rows become fields and sequences.

The index of a batch is worked out once and serves every group, since all groups hold the same tables at the same row offsets.

Shape legend: B scored rows, R rows of a block (B, or the requests of a rank call), F features of one kind on one side,
N ids, Fs pooled fields, L sequence length, D embedding dim.
"""

import torch
from torch import Tensor

from ninerank.embedding.pooling import Padding, pool_rows
from ninerank.embedding.rows import SideRows, lengths_of
from ninerank.features.batch import Batch, Block

__all__ = ["BatchIndex"]


class BatchIndex:
    """Storage rows of all ids of a batch in one vector, `row_N`, and the way back from looked-up rows to fields.

    Order: single ids of both sides row by row (side by side for one row where both sides have the same rows), then request
    bags, item bags, request sequences, item sequences.
    """

    def __init__(self, request: SideRows, item: SideRows, batch: Batch, *, pad_to_max: bool) -> None:
        self._sides = ((request, batch.request), (item, batch.item))
        self._user_row_B = batch.user_row_B
        self._is_joint = batch.user_row_B is None
        single = [side.single.single(block.single) for side, block in self._sides]
        if self._is_joint:
            single = [torch.cat(single)]
        parts = [row_FR.t().reshape(-1) for row_FR in single]
        parts += [side.bags.jagged(block.bags) for side, block in self._sides]
        parts += [side.sequences.jagged(block.sequences) for side, block in self._sides]
        self._sizes = [part.numel() for part in parts]
        self.row_N = torch.cat(parts)
        self._paddings = [_padding(side, block, pad_to_max) for side, block in self._sides]

    def assemble(self, rows_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """From the rows of `row_N`: pooled fields (B, Fs, D), and rows of each sequence (B, L, D), zero beyond its end."""
        parts = self._parts(rows_ND)
        single, bag_parts, sequence_parts = parts[:-4], parts[-4:-2], parts[-2:]
        return self._fields(single, bag_parts, rows_ND.shape[1]), self._sequences(sequence_parts)

    def masks(self) -> dict[str, Tensor]:
        """Which places (B, L) of each sequence hold an id."""
        request, item = (
            dict(zip(side.sequences.keys, padding.masks if padding else (), strict=True))
            for (side, _), padding in zip(self._sides, self._paddings, strict=True)
        )
        return {key: self._expanded(mask_RL) for key, mask_RL in request.items()} | item

    def _parts(self, rows_ND: Tensor) -> list[Tensor]:
        if sum(size > 0 for size in self._sizes) > 1:
            return list(torch.split_with_sizes(rows_ND, self._sizes))
        # One part holds all rows: a split would copy them in its backward.
        return [rows_ND if size else rows_ND[:0] for size in self._sizes]

    def _fields(self, single: list[Tensor], bag_parts: list[Tensor], dim: int) -> Tensor:
        counts = [len(side.single.keys) for side, _ in self._sides]
        bags = [_pooled(side, block, part) for (side, block), part in zip(self._sides, bag_parts, strict=True)]
        if self._is_joint:
            single_BFD = single[0].view(self._sides[0][1].num_rows, sum(counts), dim)
            if not any(bag.shape[1] for bag in bags):
                return single_BFD
            request, item = torch.split_with_sizes(single_BFD, counts, dim=1)
        else:
            request, item = (part.view(block.num_rows, n, dim) for part, n, (_, block) in zip(single, counts, self._sides, strict=True))
        return torch.cat([self._expanded(torch.cat([request, bags[0]], dim=1)), item, bags[1]], dim=1)

    def _sequences(self, parts: list[Tensor]) -> dict[str, Tensor]:
        request, item = (
            dict(zip(side.sequences.keys, padding.pad(part) if padding else (), strict=True))
            for (side, _), padding, part in zip(self._sides, self._paddings, parts, strict=True)
        )
        return {key: self._expanded(rows_RLD) for key, rows_RLD in request.items()} | item

    def _expanded(self, tensor: Tensor) -> Tensor:
        """Request rows repeated for each candidate, as late as can be."""
        return tensor if self._user_row_B is None else tensor.index_select(0, self._user_row_B)


def _pooled(side: SideRows, block: Block, rows_ND: Tensor) -> Tensor:
    """Pooled bags (R, F, D)."""
    count, dim = len(side.bags.keys), rows_ND.shape[1]
    if count == 0:
        return rows_ND.new_empty(block.num_rows, 0, dim)
    pooled_MD = pool_rows(rows_ND, lengths_of(block.bags))
    scale_M1 = side.bag_scale(block.bags)
    if scale_M1 is not None:
        pooled_MD = pooled_MD * scale_M1
    return pooled_MD.view(count, block.num_rows, dim).transpose(0, 1)


def _padding(side: SideRows, block: Block, pad_to_max: bool) -> Padding | None:
    if not side.max_lengths:
        return None
    # At least one place, so that a batch of empty histories has a shape that graphs can take.
    widths = side.max_lengths if pad_to_max else [max(1, longest) for longest in side.longest(block)]
    return Padding.of(lengths_of(block.sequences), block.sequences.values.numel(), block.num_rows, widths)
