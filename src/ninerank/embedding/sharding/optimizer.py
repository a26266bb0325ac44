"""The optimizer of sharded tables: each process updates the rows it holds, by the fused rules, as one process would.

Gradients arrive where the rows lie, from all processes, and wait for `step`. Two things need an exchange. Tables that every process
copies: touched rows and their gradients are gathered, in the order of the processes, so that all copies change alike. Row-wise Adagrad
over columns, and bounds on the norm of a row: the sum of squares of a row is added up over its shards. Gradients of dynamic tables are
sent to the owners of their ids, which update them as one process would.

Shape legend: K touched rows, R rows of a storage, D columns in it, T tables, W processes.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from ninerank.embedding.optimizer import SparseOptimizerConfig
from ninerank.embedding.pending import PendingGradients
from ninerank.embedding.shard import Shard, absent
from ninerank.embedding.sharding.collection import ShardedEmbeddingCollection
from ninerank.embedding.sharding.exchange import gather_rows, global_sum
from ninerank.embedding.sharding.fbgemm import FBGEMM, check_fbgemm
from ninerank.embedding.sharding.storage import BlockStorage
from ninerank.errors import SpecError
from ninerank.fusion.kernels.embedding_update import RowOptimizer, RowwiseAdagrad
from ninerank.fusion.lookup import LookupGrad

__all__ = ["ShardedOptimizer", "row_bytes"]


def row_bytes(rule: RowOptimizer, groups: Mapping[str, int]) -> dict[str, int]:
    """Bytes of one row's values and optimizer state, by group.

    >>> row_bytes(RowwiseAdagrad(), {"deep": 16})
    {'deep': 68}
    """
    found = {}
    for group, dim in groups.items():
        weight = torch.empty(1, dim)
        tensors = [weight, *rule.new_state(weight, torch.ones(1))]
        found[group] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return found


class ShardedOptimizer:
    """Same surface as `SparseOptimizer`; every method is a collective call unless it says otherwise."""

    def __init__(self, collection: ShardedEmbeddingCollection, config: SparseOptimizerConfig) -> None:
        config.check_tables([*(placed.table for placed in collection.plan.placed), *collection.managed])
        if collection.kernel == FBGEMM:
            check_fbgemm(config, collection.plan.placed, collection.device)
        self.config = config
        self._is_clippable = collection.kernel != FBGEMM
        self._rule = config.rule
        self._storages = collection.storages
        self._placed = collection.plan.placed
        self._device = collection.device
        self._world_size = collection.plan.world_size
        self._lr_T = [torch.tensor([config.lr_of(held.table) for held in storage.held], device=self._device) for storage in self._storages]
        self._state = [storage.new_state(self._rule, lr_T) for storage, lr_T in zip(self._storages, self._lr_T, strict=True)]
        self.lr_scale = 1.0
        self._is_exchanged = False
        self._dealt, self._managed, self._tier_shards = collection.dealt, collection.managed, collection.tier_shards
        for name, table in self._managed.items():
            table.train_with(self._rule, config.lr_of(name))

    @property
    def lr_scale(self) -> float:
        """What every learning rate is multiplied by; to be set before the backward pass. No collective call."""
        return self._lr_scale

    @lr_scale.setter
    def lr_scale(self, scale: float) -> None:
        self._lr_scale = scale
        for storage in self._storages:
            storage.expect(scale)

    def zero_grad(self) -> None:
        """Forget all gradients; no collective call."""
        for storage in self._storages:
            storage.gradients.clear()
        for table in self._managed.values():
            table.zero_grad()
        if self._dealt is not None:
            self._dealt.forget()
        self._is_exchanged = False

    def grad_norm(self) -> Tensor:
        """L2 norm over all touched rows of all processes, duplicates summed first; a scalar, the same everywhere.

        Raises SpecError where FBGEMM has applied the gradients already.
        """
        if not self._is_clippable:
            raise SpecError("sharding.kernel fbgemm updates tables in the backward pass: no schedule.clip_norm, or take kernel auto")
        self._exchange()
        own, copied = torch.zeros(2, device=self._device).unbind()
        for storage in self._storages:
            grad = storage.coalesced()
            if grad is not None:
                square = torch.linalg.vector_norm(grad.grad_GD).square()
                own, copied = (own, copied + square) if storage.is_copy else (own + square, copied)
        for pending, num_rows in self._pending():
            grad = pending.coalesced(num_rows)
            if grad is not None:
                own = own + torch.linalg.vector_norm(grad.grad_GD).square().to(self._device)
        return (global_sum(own) + copied).sqrt()

    def scale_grad_(self, factor: float | Tensor) -> None:
        """Multiply all gradients; no collective call."""
        for storage in self._storages:
            storage.gradients.scale_(factor)
        for pending, _ in self._pending():
            pending.scale_(factor)

    def _pending(self) -> Iterator[tuple[PendingGradients, int]]:
        """Gradients of managed tables on their owner, and the rows that they are of."""
        for table in self._managed.values():
            for group, pending in table.gradients.items():
                yield pending, table.num_rows(group)

    @torch.no_grad()
    def step(self) -> None:
        """Update the touched rows; call `zero_grad` before the next backward."""
        self._exchange()
        for storage, state, lr_T in zip(self._storages, self._state, self._lr_T, strict=True):
            if self._needs_whole_rows and storage.is_column_wise:
                self._update_columns(storage, state, lr_T * self.lr_scale)
            else:
                storage.update(state, lr_T * self.lr_scale, self._rule)
        for table in self._managed.values():
            table.update(self.lr_scale)
        if self._dealt is not None:
            self._dealt.changed()

    @property
    def _needs_whole_rows(self) -> bool:
        return isinstance(self._rule, RowwiseAdagrad) or self._rule.max_row_norm is not None

    def _update_columns(self, storage: BlockStorage, state: Mapping[str, Tensor], lr_T: Tensor) -> None:
        """The rule with what it asks of a whole row added up over the row's shards.

        All processes hold equal column blocks of the same tables and see the ids of all, so that their touched rows are the same.
        """
        grad = storage.coalesced()
        if grad is None:
            return
        rule, row_K, grad_KD = self._rule, grad.rows_N.long(), grad.grad_GD
        if rule.max_gradient is not None:
            grad_KD = grad_KD.clamp(-rule.max_gradient, rule.max_gradient)
        if rule.max_row_norm is not None:
            norm_K = global_sum(grad_KD.square().sum(1)).sqrt()
            grad_KD = torch.where((norm_K > rule.max_row_norm)[:, None], grad_KD * (rule.max_row_norm / norm_K)[:, None], grad_KD)
        plain = rule.model_copy(update={"max_gradient": None, "max_row_norm": None})
        if not isinstance(rule, RowwiseAdagrad):
            bounded = LookupGrad(grad_KD.contiguous(), grad.rows_N)
            bounded.apply(storage.weight, list(state.values()), storage.first_row_T, lr_T, plain, kernel=storage.kernel)
            return
        weight_KD = storage.weight.index_select(0, row_K)
        grad_KD = grad_KD.add(weight_KD, alpha=rule.weight_decay)
        mean_K = global_sum(grad_KD.square().sum(1)) / (grad_KD.shape[1] * self._world_size)
        sum_K = state["sum"].index_select(0, row_K) + mean_K
        state["sum"].index_copy_(0, row_K, sum_K)
        lr_K = lr_T[torch.searchsorted(storage.first_row_T, row_K, right=True) - 1]
        scale_K = lr_K / (sum_K.sqrt() + rule.eps)
        storage.weight.index_copy_(0, row_K, weight_KD - grad_KD * scale_K[:, None])

    def _exchange(self) -> None:
        """Give all copies and owners the mean of all processes' gradients, which TorchRec's backward gives the other tables."""
        if self._is_exchanged:
            return
        self._is_exchanged = True
        if self._dealt is not None:
            self._dealt.send()
        for storage in self._storages:
            if storage.is_copy:
                gathered = gather_rows(storage.coalesced(), storage.weight.shape[1], self._device)
                if gathered is not None:
                    storage.replace(LookupGrad(gathered[1] / self._world_size, gathered[0]))

    def state_dict(self, *, reading: bool = False) -> dict[str, Shard]:
        """Of static and tiered tables: this process's block of each state under `<group>.<table>.<state>`, without elements where it
        has none.

        No collective call.

        Of what several processes hold alike (tables they copy, one value a row where columns are shared out) the first one names the
        block; all do when `reading`, and fill the tensors in place.
        """
        found = {}
        for placed in self._placed:
            for name, width, dtype in _widths(self._rule, placed.dim):
                shape = (placed.num_rows, width) if width else (placed.num_rows,)
                found[f"{placed.group}.{placed.table}.{name}"] = absent(shape, dtype)
        for storage, state in zip(self._storages, self._state, strict=True):
            for place, held in enumerate(storage.held):
                for name, tensor in state.items():
                    is_repeated = held.is_copy or (tensor.dim() == 1 and storage.is_column_wise)
                    if reading or not is_repeated or dist.get_rank() == 0:
                        found[f"{held.key}.{name}"] = storage.shard(place, tensor, columns=tensor.dim() == 2)
        for table, columns in self._tier_shards(reading=reading).items():
            named = [(name.split(".", 2), shard) for name, shard in columns.items() if name.startswith("state.")]
            found.update({f"{group}.{table}.{key}": shard for (_, group, key), shard in named})
        return found


def _widths(rule: RowOptimizer, dim: int) -> list[tuple[str, int, torch.dtype]]:
    """Name of each state tensor, its columns (0 for one value a row) and its type."""
    tensors = rule.new_state(torch.empty(1, dim), torch.ones(1))
    return [(name, dim if tensor.dim() == 2 else 0, tensor.dtype) for name, tensor in zip(rule.state_names, tensors, strict=True)]
