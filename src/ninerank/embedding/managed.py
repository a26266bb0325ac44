"""Tables with a storage of their own, which are told a batch's ids before it is looked up.

A training step of a managed table is

    rows = table.prepare(ids, step=s)        on the host: ids -> rows of the table's storage, made or fetched where needed
    values = table.rows("deep", rows)        differentiable; the backward leaves gradients in `gradients["deep"]`
    table.update(lr_scale)                   the fused rule on the touched rows
    table.finish_step(s)                     rows may be given up

Shape legend: N ids, D embedding dim of a group.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from ninerank.embedding.pending import PendingGradients
from ninerank.fusion.kernels.embedding_update import RowOptimizer

__all__ = ["ManagedTable", "TableStatistics"]


class TableStatistics(Protocol):
    """Figures of one table, or of a part of it."""

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """Of the whole table, from those of its parts."""

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Name -> value, as `<prefix>.<figure>`."""


class ManagedTable(Protocol):
    """What the collection, the optimizer and checkpoints ask of such a table."""

    name: str
    dims: dict[str, int]
    device: torch.device

    @property
    def gradients(self) -> Mapping[str, PendingGradients]:
        """Gradients by group since the last `zero_grad`."""

    def train_with(self, optimizer: RowOptimizer, lr: float) -> None:
        """Keep the optimizer's state beside the rows, from now on; the table holds no rows that were trained otherwise."""

    def prepare(self, ids: Tensor, *, step: int | None = None, times: Tensor | None = None) -> Tensor:
        """Rows (int64, shape of `ids`) of ids (int64, on the host); step: number of the training step, None to read alone.

        times: occurrences that each id stands for where these are counted; 0 for one that is only read. One call a batch, with all ids
        of the table. Raises DataError for ids that the table cannot have.
        """

    def rows(self, group: str, row_N: Tensor) -> Tensor:
        """Values (N, D), float32."""

    def num_rows(self, group: str) -> int:
        """Rows of a group's storage now."""

    def update(self, lr_scale: float = 1.0) -> None:
        """Apply the rule to the rows that have gradients, and forget these."""

    def zero_grad(self) -> None:
        """Forget all gradients."""

    def finish_step(self, step: int) -> object:
        """End a training step."""

    def values_state(self) -> dict[str, Tensor]:
        """What scores: named tensors of any length, by which `load_values` makes the same scores."""

    def load_values(self, state: Mapping[str, Tensor]) -> None:
        """Take what `values_state` gave; optimizer state starts afresh. Raises CheckpointError, and changes nothing, if it does not fit."""

    def state(self) -> dict[str, Tensor]:
        """All that training goes on from, values among it."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave. Raises CheckpointError, and changes nothing, if it does not fit."""

    def statistics(self) -> TableStatistics:
        """Figures about the table."""

    def metrics(self) -> dict[str, float]:
        """`statistics` by name."""

    def close(self) -> None:
        """Give up threads and files, if it has any; it is not used afterwards. May be called twice, and in the middle of a step."""
