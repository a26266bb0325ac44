"""Blocks of tables that one process holds, in one storage: lookup by our kernels, gradients pending until the optimizer's step.

Shape legend: N ids, R rows of the storage, F features, B bags a feature, D columns, K touched rows, T tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from ninerank.embedding.pending import PendingGradients
from ninerank.embedding.shard import Shard
from ninerank.embedding.sharding.plan import Block
from ninerank.embedding.table import initial_rows
from ninerank.fusion.kernels.embedding_update import RowOptimizer
from ninerank.fusion.lookup import LookupGrad, pooled, sequence

__all__ = ["BlockStorage", "Held"]


@dataclass(frozen=True)
class Held:
    """A block of one table at one group's dim. is_copy: every process holds the whole table."""

    table: str
    group: str
    num_rows: int
    dim: int
    block: Block
    is_copy: bool

    @property
    def key(self) -> str:
        return f"{self.group}.{self.table}"


class BlockStorage(nn.Module):
    """Blocks of equal width below each other in one (R, D) tensor, the unit of lookup and of update.

    Gradients of the touched rows wait in `gradients`; rows that several lookups or bags share are summed by `coalesced`, once.
    """

    first_row_T: Tensor

    def __init__(self, held: tuple[Held, ...], device: torch.device, *, kernel: str, seed: int, init_std: float) -> None:
        super().__init__()
        self.held = held
        self.kernel = kernel
        sizes = [len(each.block.rows) for each in held]
        first_row = list(accumulate(sizes, initial=0))
        self.slices = [slice(start, stop) for start, stop in pairwise(first_row)]
        weight_RD = torch.empty(first_row[-1], len(held[0].block.columns))
        for each, rows in zip(held, self.slices, strict=True):
            _draw(weight_RD[rows], each, seed, init_std)
        self.weight = nn.Parameter(weight_RD.to(device), requires_grad=False)
        self.register_buffer("first_row_T", torch.tensor(first_row[:-1], dtype=torch.int64, device=device), persistent=False)
        self.gradients = PendingGradients()

    @property
    def is_copy(self) -> bool:
        return self.held[0].is_copy

    @property
    def is_column_wise(self) -> bool:
        """Whether rows are shared out by columns; then all blocks here are, for TorchRec keeps kinds apart."""
        return len(self.held[0].block.columns) < self.held[0].dim

    def new_state(self, rule: RowOptimizer, lr_T: Tensor) -> dict[str, Tensor]:
        """State by name of all rows, where blocks are to be trained with these learning rates."""
        lr_R = lr_T.repeat_interleave(torch.tensor([rows.stop - rows.start for rows in self.slices], device=lr_T.device))
        return dict(zip(rule.state_names, rule.new_state(self.weight, lr_R), strict=True))

    def update(self, state: Mapping[str, Tensor], lr_T: Tensor, rule: RowOptimizer) -> None:
        """Update the touched rows and their state in place."""
        self.gradients.apply(self.weight, list(state.values()), self.first_row_T, lr_T, rule, kernel=self.kernel)

    def expect(self, lr_scale: float) -> None:
        """Learn what the next update will multiply learning rates by, before the backward pass."""

    def look_up_bags(self, ids_N: Tensor, length_M: Tensor, table_F: list[int]) -> Tensor:
        """Sums (B, F * D) of bags; ids lie feature by feature, `table_F` names the place of each one's table in `held`."""
        offsets = torch.cat([length_M.new_zeros(1), length_M.cumsum(0)])
        row_N = self._rows(ids_N, length_M, table_F)
        out_BFD = pooled(self._recorded(), row_N, offsets, len(table_F), on_grad=self.gradients.add, kernel=self.kernel)
        return out_BFD.flatten(1)

    def look_up_each(self, ids_N: Tensor, length_M: Tensor, table_F: list[int]) -> Tensor:
        """The row (N, D) of each id."""
        return sequence(self._recorded(), self._rows(ids_N, length_M, table_F), on_grad=self.gradients.add, kernel=self.kernel)

    def coalesced(self) -> LookupGrad | None:
        """The waiting gradients, one entry for each touched row, rows ascending; None if no row was touched."""
        return self.gradients.coalesced(self.weight.shape[0])

    def replace(self, grad: LookupGrad) -> None:
        """Put other gradients in the place of those that wait."""
        self.gradients.clear()
        self.gradients.add(grad)

    def shard(self, place: int, tensor_R: Tensor, *, columns: bool = True) -> Shard:
        """The part of a tensor of this storage that belongs to block `place`; columns: it has one value a column, else one a row."""
        each = self.held[place]
        shape, offsets = (each.num_rows, each.dim), (each.block.rows.start, each.block.columns.start)
        own = tensor_R.detach()[self.slices[place]]
        return Shard(shape, offsets, own) if columns else Shard(shape[:1], offsets[:1], own)

    def extra_repr(self) -> str:
        return f"{len(self.held)} blocks, {tuple(self.weight.shape)}{', copied' if self.is_copy else ''}"

    def _recorded(self) -> Tensor:
        """The storage as a lookup takes it whose gradient is caught."""
        return self.weight.detach().requires_grad_(torch.is_grad_enabled())

    def _rows(self, ids_N: Tensor, length_M: Tensor, table_F: list[int]) -> Tensor:
        if len(self.held) == 1:
            return ids_N
        count_F = length_M.view(len(table_F), -1).sum(1)
        first_F = self.first_row_T[torch.tensor(table_F, device=self.first_row_T.device)]
        return ids_N + first_F.repeat_interleave(count_F, output_size=ids_N.numel())


def _draw(own_RD: Tensor, held: Held, seed: int, init_std: float) -> None:
    """Start values of a block: those rows and columns of what one process would draw for the whole table."""
    rows, columns = held.block.rows, slice(held.block.columns.start, held.block.columns.stop)
    for first, values in initial_rows(seed, held.group, held.table, rows.stop, held.dim, init_std, first_row=rows.start):
        begin, end = max(first, rows.start), min(first + len(values), rows.stop)
        if begin < end:
            own_RD[begin - rows.start : end - rows.start] = torch.tensor(values[begin - first : end - first, columns])
