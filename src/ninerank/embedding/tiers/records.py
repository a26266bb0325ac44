"""One row's values and optimizer state, of all groups, as one record of 32-bit words.

    | value.deep (D) | state.deep.sum (1) | value.linear (1) | state.linear.sum (1) |

A row that comes or goes then costs one access to the backing store, where a file or an array per column would cost one each; on disk
that is one page instead of as many as there are columns. A column is a view of the records, with the width of a record between its rows.

R rows of a table, K moved rows, W words of a record, D embedding dim of a group.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.dynamic.native import prefetch
from ninerank.embedding.table import initial_rows
from ninerank.features.native import jit
from ninerank.fusion.kernels.embedding_update import RowOptimizer

__all__ = ["Columns", "Record", "RecordColumn", "Words", "gather", "initial_values", "scatter", "with_fresh_state"]

Words = npt.NDArray[np.int32]
Columns = Mapping[str, Tensor]

WORD_BYTES = 4
WORDS_PER_LINE = 16
ROWS_AHEAD = 8


@dataclass(frozen=True)
class RecordColumn:
    """Place of one column in a record. width: numbers a row, 0 for one number without a dimension of its own."""

    name: str
    first_word: int
    width: int
    dtype: torch.dtype

    @property
    def num_words(self) -> int:
        return max(self.width, 1)

    def of(self, records_KW: Tensor) -> Tensor:
        """View (K, width) or (K,) of the column."""
        words = records_KW[:, self.first_word : self.first_word + self.num_words].view(self.dtype)
        return words if self.width else words[:, 0]


@dataclass(frozen=True)
class Record:
    """Columns of a record, in their order."""

    columns: tuple[RecordColumn, ...]

    @classmethod
    def of(cls, dims: Mapping[str, int], optimizer: RowOptimizer | None) -> "Record":
        columns: list[RecordColumn] = []
        for group, dim in dims.items():
            values = torch.empty(1, dim)
            named = [(f"value.{group}", values)]
            if optimizer is not None:
                states = zip(optimizer.state_names, optimizer.new_state(values, torch.ones(1)), strict=True)
                named += [(f"state.{group}.{name}", state) for name, state in states]
            for name, tensor in named:
                if tensor.dtype.itemsize != WORD_BYTES:
                    raise ValueError(f"{name} is {tensor.dtype}; records are made of numbers of {WORD_BYTES} bytes")
                first = columns[-1].first_word + columns[-1].num_words if columns else 0
                columns.append(RecordColumn(name, first, tensor.shape[1] if tensor.dim() == 2 else 0, tensor.dtype))
        return cls(tuple(columns))

    @property
    def num_words(self) -> int:
        return self.columns[-1].first_word + self.columns[-1].num_words

    @property
    def num_bytes(self) -> int:
        return self.num_words * WORD_BYTES

    def split(self, records_KW: Tensor) -> dict[str, Tensor]:
        """Views of all columns."""
        return {column.name: column.of(records_KW) for column in self.columns}

    def pack(self, columns: Columns) -> Tensor:
        """Records (K, W) int32 of columns that have K rows each."""
        return torch.cat([columns[column.name].view(torch.int32).reshape(-1, column.num_words) for column in self.columns], dim=1)


def initial_values(
    dims: Mapping[str, int], *, seed: int, table: str, num_rows: int, std: float, first_row: int = 0
) -> Iterator[tuple[int, Columns]]:
    """Blocks (first row, values by column) of the start of rows `first_row`, ... of a table, equal to those of a table in memory."""
    stop = first_row + num_rows
    groups = [initial_rows(seed, group, table, stop, dim, std, first_row=first_row) for group, dim in dims.items()]
    for drawn in zip(*groups, strict=True):
        first = drawn[0][0]
        skipped = max(0, first_row - first)
        values = {f"value.{group}": torch.from_numpy(values[skipped:]) for group, (_, values) in zip(dims, drawn, strict=True)}
        yield first + skipped - first_row, values


def with_fresh_state(
    record: Record, blocks: Iterable[tuple[int, Columns]], optimizer: RowOptimizer | None, lr: float
) -> Iterator[tuple[int, Words]]:
    """Blocks (first row, records) of values that the optimizer has not met."""
    lr_1 = torch.tensor([lr])
    for first, values in blocks:
        columns = dict(values)
        for name, tensor in values.items():
            if optimizer is None:
                continue
            states = optimizer.new_state(tensor.contiguous(), lr_1)
            names = (name.replace("value.", "state.", 1) + f".{state}" for state in optimizer.state_names)
            columns |= dict(zip(names, states, strict=True))
        yield first, record.pack(columns).numpy()


@jit
def _gather(records, rows, out):  # type: ignore[no-untyped-def]
    count, width = out.shape
    for i in range(count):
        if i + ROWS_AHEAD < count:
            for word in range(0, width, WORDS_PER_LINE):
                prefetch(records, rows[i + ROWS_AHEAD] * width + word)
        row = rows[i]
        for word in range(width):
            out[i, word] = records[row, word]


@jit
def _scatter(records, rows, values):  # type: ignore[no-untyped-def]
    count, width = values.shape
    for i in range(count):
        if i + ROWS_AHEAD < count:
            for word in range(0, width, WORDS_PER_LINE):
                prefetch(records, rows[i + ROWS_AHEAD] * width + word)
        row = rows[i]
        for word in range(width):
            records[row, word] = values[i, word]


def gather(records: Words, rows: Ints, out: Words) -> None:
    """out[i] = records[rows[i]], without the GIL; rows lie within the table."""
    _gather(records, rows, out)


def scatter(records: Words, rows: Ints, values: Words) -> None:
    """records[rows[i]] = values[i], without the GIL; rows are distinct and lie within the table."""
    _scatter(records, rows, values)
