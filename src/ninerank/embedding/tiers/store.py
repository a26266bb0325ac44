"""All rows of a table, in RAM or on disk: written at the start, written anew with another optimizer's state, read and loaded by column.

R rows of the table, D embedding dim of a group.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ninerank.embedding.tiers.backing import Backing, DiskBacking, HostBacking
from ninerank.embedding.tiers.config import TierConfig
from ninerank.embedding.tiers.records import Columns, Record, Words, initial_values, with_fresh_state
from ninerank.embedding.tiers.scratch import Owner, OwnerColumn, ScratchDirectory
from ninerank.errors import CheckpointError
from ninerank.fusion.kernels.embedding_update import RowOptimizer

__all__ = ["BLOCK_ROWS", "Store"]

BLOCK_ROWS = 65_536


class Store:
    """Records of a table under an optimizer, or of values alone with None. Raises SpecError for a directory that cannot be."""

    def __init__(
        self,
        name: str,
        num_rows: int,
        dims: Mapping[str, int],
        config: TierConfig,
        optimizer: RowOptimizer | None,
        *,
        lr: float,
        seed: int,
        init_std: float,
        first_row: int = 0,
    ) -> None:
        self.name, self.num_rows, self._dims = name, num_rows, dims
        self._optimizer, self._lr, self._seed, self._init_std = optimizer, lr, seed, init_std
        self.record = Record.of(dims, optimizer)
        self._scratch = None if config.directory is None else ScratchDirectory(config.directory, self._owner())
        self._backing = self._built(initial_values(dims, seed=seed, table=name, num_rows=num_rows, std=init_std, first_row=first_row))

    @property
    def words(self) -> Words:
        """Records (R, W)."""
        return self._backing.words

    def rebuild(self, optimizer: RowOptimizer, lr: float) -> None:
        """Keep the values, and this optimizer's state beside them from now on."""
        values = self.blocks(BLOCK_ROWS, only="value.")
        self._optimizer, self._lr, self.record = optimizer, lr, Record.of(self._dims, optimizer)
        if self._scratch is not None:
            self._scratch.change_owner(self._owner())
        self._backing = self._built(values)

    def _built(self, values: Iterable[tuple[int, Columns]]) -> Backing:
        start = with_fresh_state(self.record, values, self._optimizer, self._lr)
        if self._scratch is None:
            return HostBacking(self.num_rows, self.record.num_words, start)
        return DiskBacking(self._scratch, self.num_rows, self.record.num_words, start)

    def _owner(self) -> Owner:
        columns = tuple(
            OwnerColumn(name=c.name, first_word=c.first_word, width=c.width, dtype="int32" if c.dtype == torch.int32 else "float32")
            for c in self.record.columns
        )
        rule = None if self._optimizer is None else self._optimizer.canonical_json()
        more = {"lr": self._lr, "seed": self._seed, "init_std": self._init_std}
        return Owner.parse({"table": self.name, "num_rows": self.num_rows, "columns": columns, "optimizer": rule, **more}, "owner")

    def expect(self, *, in_order: bool) -> None:
        """Say how rows will be touched from now on: one after the other, or here and there."""
        self._backing.expect(in_order=in_order)

    def columns(self, only: str = "") -> dict[str, Tensor]:
        """Views (R, D) or (R,) of the columns whose name begins with `only`."""
        every = self.record.split(torch.from_numpy(self.words))
        return {name: tensor for name, tensor in every.items() if name.startswith(only)}

    def blocks(self, rows: int, only: str = "") -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Columns as they are now, as copies, at most `rows` rows at a time, with the number of the first."""
        columns = self.columns(only)
        return (
            (first, {name: tensor[first : first + rows].clone() for name, tensor in columns.items()})
            for first in range(0, self.num_rows, rows)
        )

    def check(self, state: Mapping[str, Tensor], only: str = "") -> None:
        """Raise CheckpointError unless `state` holds all columns whose name begins with `only`."""
        wanted = {column.name: column for column in self.record.columns if column.name.startswith(only)}
        for key in sorted(state.keys() ^ wanted.keys()):
            where = "is missing" if key in wanted else "is not of this table"
            raise CheckpointError(f"table {self.name!r}: {key!r} {where}; needed: {', '.join(wanted)}")
        for name, column in wanted.items():
            met, shape = state[name], (self.num_rows, column.width) if column.width else (self.num_rows,)
            if met.dtype != column.dtype or tuple(met.shape) != shape:
                raise CheckpointError(f"table {self.name!r}: {name!r} is {met.dtype} {tuple(met.shape)}, {column.dtype} {shape} is needed")

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take all columns, block by block; with values alone, the optimizer starts afresh."""
        blocks = (
            (first, {name: tensor[first : first + BLOCK_ROWS].detach().cpu() for name, tensor in state.items()})
            for first in range(0, self.num_rows, BLOCK_ROWS)
        )
        is_whole = len(state) == len(self.record.columns)
        packed = ((first, self.record.pack(columns).numpy()) for first, columns in blocks)
        records: Iterator[tuple[int, Words]] = packed if is_whole else with_fresh_state(self.record, blocks, self._optimizer, self._lr)
        for first, block in records:
            self._backing.write(first, block)

    def close(self, *, keep: bool) -> None:
        """Give the place up, or keep what lies on disk."""
        self._backing.close(keep=keep)
