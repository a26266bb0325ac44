"""From the ids of a batch to the rows of a part's tables, and from looked-up rows back to fields and sequences.

Shape legend: R rows of a block (B scored rows or U requests), F features of one kind on one side, M bags (F * R), N ids,
Fs pooled fields, L sequence length, D embedding dim.
"""

from collections.abc import Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor

from ninerank.embedding.pooling import Jagged, Padding
from ninerank.embedding.rows import SideRows, lengths_of
from ninerank.features.batch import Batch, Block

__all__ = ["BatchIndex", "Rows", "SequenceLength"]

SequenceLength = Literal["longest", "max", "jagged"]


class Rows(Protocol):
    """One storage, as `TableGroup` has it."""

    def rows(self, row_N: Tensor) -> Tensor:
        """Values (N, D) of rows."""

    def pool(self, row_N: Tensor, offsets: Tensor | None, num_features: int, mean_F: Tensor | None = None) -> Tensor:
        """Bags (B, F, D) of rows."""


class BatchIndex:
    """Storage rows of all ids of a batch, worked out once for all groups.

    Single ids of both sides are one lookup where both sides have the same rows; bags are one lookup a side, sequences one in all.
    length: of sequences: padded to the longest of the batch or to their greatest, or jagged, without padding.
    apart: keep the sides apart, each with the rows of its own block; sequences are padded then.
    """

    def __init__(self, request: SideRows, item: SideRows, batch: Batch, *, length: SequenceLength, apart: bool = False) -> None:
        self._sides = ((request, batch.request), (item, batch.item))
        self._user_row_B = None if apart else batch.user_row_B
        single = [side.single.single(block.single) for side, block in self._sides]
        self._is_joint = batch.user_row_B is None and not apart
        self._single = [torch.cat(single)] if self._is_joint else single
        self._bags = [side.bags.jagged(block.bags) for side, block in self._sides]
        self._offsets = [block.bags.offsets() if side.bags.keys else None for side, block in self._sides]
        self._is_jagged = length == "jagged" and not apart
        self._layouts: list[Padding | Jagged | None]
        if self._is_jagged:
            rows = (batch.user_row_B, None)
            self._layouts = [_jagged(side, block, row_B) for (side, block), row_B in zip(self._sides, rows, strict=True)]
        else:
            self._layouts = [_padding(side, block, length == "max") for side, block in self._sides]
        if any(self._layouts):
            sequences = [side.sequences.jagged(block.sequences) for side, block in self._sides]
            self._sizes = [part.numel() for part in sequences]
            self._sequences = torch.cat(sequences)

    def assemble(self, storage: Rows) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Looked up in `storage`: pooled fields (B, Fs, D), None without any; rows of each sequence (B, L, D), zero beyond its end;
        (N, D) where jagged.
        """
        request, item = self._fields(storage)
        return _joined([None if request is None else self._expanded(request), item]), self._histories(storage)

    def assemble_apart(self, storage: Rows) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """Looked up in `storage`: pooled fields of the request side (U, Fs, D) and of the item side (B, Fs, D), and the sequences."""
        return *self._fields(storage), self._histories(storage)

    def places(self) -> dict[str, Tensor]:
        """Where each sequence's ids are: "mask.<name>" (B, L), which places hold one; where jagged, "offsets.<name>" (B + 1,)."""
        kind = "offsets" if self._is_jagged else "mask"
        found = self._by_key([layout.offsets if isinstance(layout, Jagged) else layout.masks if layout else () for layout in self._layouts])
        return {f"{kind}.{key}": place for key, place in found.items()}

    def _fields(self, storage: Rows) -> tuple[Tensor | None, Tensor | None]:
        """Pooled fields of both sides; those of both in the first where they are one lookup."""
        single = [storage.pool(row_FR.reshape(-1), None, len(row_FR)) if len(row_FR) else None for row_FR in self._single]
        bags = [
            storage.pool(row_N, offsets, len(side.bags.keys), side.mean_bags(row_N.device)) if side.bags.keys else None
            for (side, _), row_N, offsets in zip(self._sides, self._bags, self._offsets, strict=True)
        ]
        if self._is_joint and single[0] is not None and (bags[0] is not None or bags[1] is not None):
            single = list(torch.split_with_sizes(single[0], [len(side.single.keys) for side, _ in self._sides], dim=1))
        return _joined([single[0], bags[0]]), _joined([*single[1:], bags[1]])

    def _histories(self, storage: Rows) -> dict[str, Tensor]:
        if not any(self._layouts):
            return {}
        parts = torch.split_with_sizes(storage.rows(self._sequences), self._sizes)
        return self._by_key([_arranged(layout, part) if layout else () for layout, part in zip(self._layouts, parts, strict=True)])

    def _by_key(self, of_sides: Iterable[Iterable[Tensor]]) -> dict[str, Tensor]:
        """Tensors of both sides' sequences by name; padded ones of requests are repeated for each candidate, as jagged ones are already."""
        request, item = (dict(zip(side.sequences.keys, own, strict=True)) for (side, _), own in zip(self._sides, of_sides, strict=True))
        if not self._is_jagged:
            request = {key: self._expanded(tensor) for key, tensor in request.items()}
        return request | item

    def _expanded(self, tensor: Tensor) -> Tensor:
        """Request rows repeated for each candidate, as late as can be."""
        return tensor if self._user_row_B is None else tensor.index_select(0, self._user_row_B)


def _joined(fields: list[Tensor | None]) -> Tensor | None:
    held = [field for field in fields if field is not None]
    return torch.cat(held, dim=1) if len(held) > 1 else held[0] if held else None


def _arranged(layout: Padding | Jagged, rows_ND: Tensor) -> list[Tensor]:
    return layout.split(rows_ND) if isinstance(layout, Jagged) else layout.pad(rows_ND)


def _jagged(side: SideRows, block: Block, row_B: Tensor | None) -> Jagged | None:
    if not side.max_lengths:
        return None
    return Jagged.of(lengths_of(block.sequences), block.num_rows, len(side.max_lengths), row_B)


def _padding(side: SideRows, block: Block, pad_to_max: bool) -> Padding | None:
    if not side.max_lengths:
        return None
    # At least one place, so that a batch of empty histories has a shape that graphs can take.
    widths = side.max_lengths if pad_to_max else [max(1, longest) for longest in side.longest(block)]
    return Padding.of(lengths_of(block.sequences), block.sequences.values.numel(), block.num_rows, widths)
