"""What the transform hands to the model: tensors of one batch, request side and item side apart.

Shape legend: B rows that are scored (training rows, or candidates), U requests, R rows of a block (B or U),
F features of a block, T labels (tasks), nnz ids in all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["Batch", "Block", "Jagged", "KeyedJagged"]


@dataclass(frozen=True)
class Jagged:
    """Ids of one feature: row r holds `values[offsets[r]:offsets[r + 1]]`.

    values: int64 (nnz,), rows of the feature's table. offsets: int64 (R + 1,).
    """

    values: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()


@dataclass(frozen=True)
class KeyedJagged:
    """Ids of several features over the same R rows, laid out feature by feature (as torchrec's KeyedJaggedTensor).

    keys: F names. values: int64 (nnz,). lengths: int64 (F * R,), or None where every row of every feature holds
    exactly one id, so that `values.view(F, R)` is the whole story. num_rows: R. longest: greatest length of each key's rows where it
    was asked for on the host, so that nobody need wait for a device to tell.
    """

    keys: tuple[str, ...]
    values: Tensor
    lengths: Tensor | None
    num_rows: int
    longest: tuple[int, ...] | None = None

    def offsets(self) -> Tensor:
        """int64 (F * R + 1,) start of each (feature, row) in `values`."""
        count = len(self.keys) * self.num_rows
        if self.lengths is None:
            return torch.arange(count + 1, device=self.values.device)
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def items(self) -> Iterator[tuple[str, Jagged]]:
        """Each feature's ids, in the order of `keys`; values are views."""
        offsets, rows = self.offsets(), self.num_rows
        bounds = offsets[::rows].tolist() if rows else [0] * (len(self.keys) + 1)
        for i, key in enumerate(self.keys):
            own = offsets[i * rows : (i + 1) * rows + 1] - bounds[i]
            yield key, Jagged(self.values[bounds[i] : bounds[i + 1]], own)

    def __getitem__(self, key: str) -> Jagged:
        if key not in self.keys:
            raise KeyError(f"{key!r} is not among {self.keys}")
        return dict(self.items())[key]

    def measured(self) -> "KeyedJagged":
        """The same ids with `longest`."""
        if self.longest is not None or self.lengths is None or not self.keys:
            return self
        longest = self.lengths.view(len(self.keys), self.num_rows).amax(1).tolist() if self.num_rows else [0] * len(self.keys)
        return replace(self, longest=tuple(longest))

    def spans(self) -> dict[str, slice]:
        """Where each feature's ids lie in `values`."""
        rows = self.num_rows
        if self.lengths is None:
            bounds = list(range(0, len(self.keys) * rows + 1, rows)) if rows else [0] * (len(self.keys) + 1)
        else:
            counts = self.lengths.view(len(self.keys), rows).sum(1).tolist() if self.keys else []
            bounds = list(accumulate(counts, initial=0))
        return {key: slice(first, stop) for key, first, stop in zip(self.keys, bounds, bounds[1:], strict=False)}

    def select(self, keys: Sequence[str]) -> "KeyedJagged":
        """The features `keys`, in their order; KeyError for one that is not here."""
        if tuple(keys) == self.keys:
            return self
        spans, rows = self.spans(), self.num_rows
        values = torch.cat([self.values[:0], *(self.values[spans[key]] for key in keys)])
        if self.lengths is None:
            return KeyedJagged(tuple(keys), values, None, rows)
        places = [self.keys.index(key) for key in keys]
        own = self.lengths.view(len(self.keys), rows)[places]
        longest = None if self.longest is None else tuple(self.longest[place] for place in places)
        return KeyedJagged(tuple(keys), values, own.reshape(-1), rows, longest)

    def to(self, device: torch.device, non_blocking: bool = False) -> "KeyedJagged":
        lengths = None if self.lengths is None else self.lengths.to(device, non_blocking=non_blocking)
        return replace(self, values=self.values.to(device, non_blocking=non_blocking), lengths=lengths)


@dataclass(frozen=True)
class Block:
    """Features of one side over R rows.

    single: id features with exactly one id a row (`lengths` is None), bucketised numbers among them.
    bags: multi-valued id features, to be pooled. sequences: ordered ids, most recent last, not pooled.
    dense_RF: float32 (R, F), in the order of `spec.dense_keys(side)`.
    """

    single: KeyedJagged
    bags: KeyedJagged
    sequences: KeyedJagged
    dense_RF: Tensor

    @property
    def num_rows(self) -> int:
        return self.dense_RF.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> "Block":
        sequences = self.sequences if device.type == "cpu" else self.sequences.measured()
        return Block(
            self.single.to(device, non_blocking),
            self.bags.to(device, non_blocking),
            sequences.to(device, non_blocking),
            self.dense_RF.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class Batch:
    """One batch: request-level features (roles user and context) and item features as two blocks.

    In training both blocks have B rows and `user_row_B` is None. In a rank call `request` has U rows (one a request),
    `item` has B rows (one a candidate) and `user_row_B` (int64) names each candidate's request row, so that whatever
    depends on the request alone is computed once.
    label_BT: float32 in {0, 1}. weight_B: float32. group_B: int64, the group key of GAUC.
    is_prepared: the ids of managed tables are rows of their storages already (`EmbeddingCollection.prepare`).
    padding: rows at the end that repeat others, so that several processes have batches of one size; they count neither in a loss nor in
    a metric.
    """

    request: Block
    item: Block
    user_row_B: Tensor | None = None
    label_BT: Tensor | None = None
    weight_B: Tensor | None = None
    group_B: Tensor | None = None
    is_prepared: bool = False
    padding: int = 0

    @property
    def num_rows(self) -> int:
        return self.item.num_rows

    @property
    def num_real_rows(self) -> int:
        """Rows without padding."""
        return self.num_rows - self.padding

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return Batch(
            self.request.to(device, non_blocking),
            self.item.to(device, non_blocking),
            move(self.user_row_B),
            move(self.label_BT),
            move(self.weight_B),
            move(self.group_B),
            self.is_prepared,
            self.padding,
        )
