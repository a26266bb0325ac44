"""Which table each feature looks into: ids of one side's features become rows of the merged storage.

Shape legend: R rows of a block, F features of one kind on one side, N ids, M bags (F * R).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ninerank.embedding.table import TableLayout
from ninerank.errors import DataError
from ninerank.features.batch import Block, KeyedJagged
from ninerank.fusion.kernels.embedding_rows import IdRangeError, embedding_rows, row_dtype

__all__ = ["KeyRows", "SideRows", "lengths_of"]


def lengths_of(ids: KeyedJagged) -> Tensor:
    """Lengths (M,), written out where every row holds one id."""
    return torch.ones_like(ids.values) if ids.lengths is None else ids.lengths


class Constants:
    """Numbers of the features, on whatever device a batch lies: not a module, since a request cannot afford its attribute lookups."""

    def __init__(self, values: Sequence[int], dtype: torch.dtype, *, on_device: torch.dtype | None = None) -> None:
        self._values, self._dtype, self._on_device = values, dtype, on_device or dtype
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The numbers on `device`."""
        tensor = self._on.get(device)
        if tensor is None:
            tensor = torch.tensor(self._values, dtype=self._dtype if device.type == "cpu" else self._on_device, device=device)
            if type(tensor) is Tensor:  # a fake tensor belongs to its trace alone
                self._on[device] = tensor
        return tensor


class KeyRows:
    """Row offset and size of the table behind each feature of one kind on one side.

    Rows of a storage that int32 can count are int32: Ascend computes int64 slowly, and half as much is moved.
    """

    def __init__(self, layout: TableLayout, tables: Mapping[str, str]) -> None:
        self.keys = tuple(tables)
        self.tables = tuple(tables.values())
        slices = self.slices = [layout.rows_of(table) for table in self.tables]
        # A managed table's storage grows: it is not in the layout, and rows of it stay as they came.
        self._num_rows = layout.total_rows
        self._dtype = row_dtype(layout.total_rows) if layout.total_rows else torch.int64
        self.offset_F = Constants([s.start for s in slices], torch.int64, on_device=self._dtype)
        self.size_F = Constants([s.stop - s.start for s in slices], torch.int64)

    def single(self, ids: KeyedJagged) -> Tensor:
        """Storage rows (F, R) of features with exactly one id a row; on the host ids are checked as `check` does."""
        shape = (len(self.keys), ids.num_rows)
        if self._on_host(ids):
            return self._mapped(ids, None).view(shape)
        return self._values(ids).view(shape) + self.offset_F.on(ids.values.device)[:, None]

    def jagged(self, ids: KeyedJagged) -> Tensor:
        """Storage rows (N,) of features with any number of ids a row; on the host ids are checked as `check` does."""
        if self._on_host(ids):
            return self._mapped(ids, ids.offsets())
        values = self._values(ids)
        return values + _per_id(self.offset_F.on(ids.values.device), ids) if self.keys else values

    def _on_host(self, ids: KeyedJagged) -> bool:
        return ids.values.device.type == "cpu" and self._num_rows > 0 and bool(self.keys)

    def _mapped(self, ids: KeyedJagged, offsets: Tensor | None) -> Tensor:
        """One pass that checks and maps, and no other threads than it needs: as torch operators the two would wait for torch's pool."""
        device = ids.values.device
        try:
            return embedding_rows(ids.values, offsets, self.offset_F.on(device), self.size_F.on(device), None, self._num_rows)
        except IdRangeError as error:
            raise self._outside(error.feature, error.id) from None

    def _values(self, ids: KeyedJagged) -> Tensor:
        return ids.values if ids.values.device.type == "cpu" else ids.values.to(self._dtype)

    def check(self, ids: KeyedJagged) -> None:
        """Raise DataError for an id outside its table. Call it where the ids lie on the host."""
        if ids.values.numel() == 0:
            return
        size_F = self.size_F.on(ids.values.device)
        if ids.lengths is None:
            low_F, high_F = ids.values.view(len(self.keys), ids.num_rows).aminmax(dim=1)
            is_wrong = bool(((low_F < 0) | (high_F >= size_F)).any())
        else:
            is_wrong = bool(((ids.values < 0) | (ids.values >= _per_id(size_F, ids))).any())
        if is_wrong:
            self._refuse(ids, size_F)

    def _refuse(self, ids: KeyedJagged, size_F: Tensor) -> None:
        wrong_N = (ids.values < 0) | (ids.values >= _per_id(size_F, ids))
        place = int(wrong_N.nonzero()[0, 0])
        feature = int(_per_id(torch.arange(len(self.keys), device=size_F.device), ids)[place])
        raise self._outside(feature, int(ids.values[place]))

    def _outside(self, feature: int, id_: int) -> DataError:
        size = self.slices[feature].stop - self.slices[feature].start
        return DataError(
            f"feature {self.keys[feature]!r}: id {id_} is outside table {self.tables[feature]!r} of {size} rows (valid: 0 to {size - 1})"
        )


class SideRows:
    """The features of one side: single ids, bags with their pooling, sequences with their greatest length."""

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
        self.single = KeyRows(layout, single)
        self.bags = KeyRows(layout, bags)
        self.sequences = KeyRows(layout, sequences)
        self.max_lengths = tuple((max_lengths or {})[key] for key in sequences)
        self.has_mean = bool(mean_bags)
        self.is_mean = [key in mean_bags for key in bags]
        self._is_mean_F = Constants(self.is_mean, torch.bool)

    def check(self, block: Block, *, ids: bool = True) -> None:
        """Raise DataError for histories, and with `ids` for ids, that do not fit this side. Call it where the block lies on the host."""
        if ids:
            self.single.check(block.single)
            self.bags.check(block.bags)
            self.sequences.check(block.sequences)
        for key, longest, greatest in zip(self.sequences.keys, self.longest(block), self.max_lengths, strict=True):
            if longest > greatest:
                raise DataError(f"sequence {key!r}: {longest} ids in a row, at most {greatest}")

    def longest(self, block: Block) -> list[int]:
        """Greatest number of ids in a row, of each sequence feature."""
        if not self.max_lengths or block.num_rows == 0:
            return [0] * len(self.max_lengths)
        known = block.sequences.measured().longest
        return [1] * len(self.max_lengths) if known is None else list(known)

    def mean_bags(self, device: torch.device) -> Tensor | None:
        """Which bags (F,) are pooled by mean; None where all are summed."""
        return self._is_mean_F.on(device) if self.has_mean else None


def _per_id(value_F: Tensor, ids: KeyedJagged) -> Tensor:
    """One value per feature, repeated for each of its ids."""
    if ids.lengths is None:
        return value_F.repeat_interleave(ids.num_rows)
    count_F = ids.lengths.view(len(ids.keys), ids.num_rows).sum(1)
    return value_F.repeat_interleave(count_F, output_size=ids.values.numel())
