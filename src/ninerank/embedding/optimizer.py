"""Optimizers that update only the rows a step touched, in plain torch.

With g the gradient of a touched row summed over its duplicates, plus `weight_decay * w` (touched rows alone), w the row, s its state:

    sgd               w <- w - lr g
    adagrad           s <- s + g^2              w <- w - lr g / (sqrt(s) + eps)     Duchi et al., JMLR 12, 2011
    rowwise_adagrad   s <- s + mean_d(g_d^2)    w <- w - lr g / (sqrt(s) + eps)     one s a row; Mudigere et al., ISCA 2022

Shape legend: V rows of a group, K touched rows, D embedding dim.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ninerank.config import Config
from ninerank.embedding.collection import EmbeddingCollection
from ninerank.embedding.table import TableGroup
from ninerank.errors import CheckpointError, SpecError, nearest

__all__ = ["SparseOptimizer", "SparseOptimizerConfig", "clip_grad_norm_", "sparse_optimizer"]


class SparseOptimizerConfig(Config):
    """Update rule of sparse tables; `table_lr` overrides `lr` for the tables it names."""

    kind: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    lr: float = Field(default=0.05, gt=0.0, allow_inf_nan=False)
    eps: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    initial_accumulator: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    table_lr: dict[str, float] = Field(default_factory=dict)


class SparseOptimizer:
    """Applies the gradients that backward passes left in a sparse collection.

    Any number of forward and backward passes may precede a step: their gradients add up, as in dense parameters.
    `lr_scale` multiplies every learning rate; a schedule sets it.
    """

    def __init__(self, collection: EmbeddingCollection, config: SparseOptimizerConfig) -> None:
        if collection.config.mode != "sparse":
            raise SpecError(f"a sparse optimizer needs embedding mode 'sparse', this collection's is {collection.config.mode!r}")
        for table, lr in config.table_lr.items():
            if table not in collection.layout.names:
                raise SpecError(f"table_lr: unknown table {table!r}; {nearest(table, collection.layout.names)}")
            if not 0.0 < lr < float("inf"):
                raise SpecError(f"table_lr: {table} = {lr}; a finite number above 0 is needed")
        self.config = config
        self.lr_scale = 1.0
        self._groups = collection.named_groups()
        self._state = {name: self._new_state(group) for name, group in self._groups}

    def _new_state(self, group: TableGroup) -> Tensor | None:
        if self.config.kind == "sgd":
            return None
        width = group.dim if self.config.kind == "adagrad" else 1
        return torch.full((group.layout.total_rows, width), self.config.initial_accumulator, device=group.storage.device)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for _, group in self._groups:
            group.gradients.clear()

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per group with any: touched rows of the merged storage in rising order (K,), and their summed gradients (K, D)."""
        merged = ((name, group.gradients.merged()) for name, group in self._groups)
        return {name: pair for name, pair in merged if pair is not None}

    def grad_norm(self) -> Tensor:
        """L2 norm over all touched rows of all groups, duplicates summed first; a scalar."""
        norms = [torch.linalg.vector_norm(grad_KD) for _, grad_KD in self.gradients().values()]
        if not norms:
            return torch.zeros((), device=self._groups[0][1].storage.device)
        return _norm(norms)

    def scale_grad_(self, factor: float | Tensor) -> None:
        """Multiply all gradients."""
        for _, group in self._groups:
            group.gradients.scale_(factor)

    @torch.no_grad()
    def step(self) -> None:
        """Update the touched rows; call `zero_grad` before the next backward."""
        for name, group in self._groups:
            merged = group.gradients.merged()
            if merged is not None:
                self._update(group, self._state[name], *merged)

    def _update(self, group: TableGroup, state_V: Tensor | None, row_K: Tensor, grad_KD: Tensor) -> None:
        config, storage = self.config, group.storage
        weight_KD = storage.index_select(0, row_K)
        if config.weight_decay:
            grad_KD = grad_KD.add(weight_KD, alpha=config.weight_decay)
        scale = self._lr(group, row_K)
        if state_V is not None:
            square_KD = grad_KD.square()
            sum_K = state_V.index_select(0, row_K).add_(square_KD if config.kind == "adagrad" else square_KD.mean(1, keepdim=True))
            state_V.index_copy_(0, row_K, sum_K)
            scale = scale / sum_K.sqrt_().add_(config.eps)
        storage.index_copy_(0, row_K, weight_KD.sub_(grad_KD * scale))

    def _lr(self, group: TableGroup, row_K: Tensor) -> float | Tensor:
        if not self.config.table_lr:
            return self.config.lr * self.lr_scale
        layout = group.layout
        lr_T = torch.tensor([self.config.table_lr.get(name, self.config.lr) * self.lr_scale for name in layout.names], device=row_K.device)
        table_K = torch.bucketize(row_K, torch.tensor(layout.offsets[1:], dtype=row_K.dtype, device=row_K.device), right=True)
        return lr_T[table_K][:, None]

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors under `<group>.<table>.sum`, views of the state; empty for sgd."""
        return {
            f"{name}.{table}.sum": state[rows]
            for name, group in self._groups
            if (state := self._state[name]) is not None
            for table, rows in group.layout.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state as `state_dict` gives it, in any order of tables; raises CheckpointError and changes nothing if it does not fit."""
        own = self.state_dict()
        for key in sorted(own.keys() ^ state.keys()):
            where = "is missing" if key in own else f"is not of this optimizer ({self.config.kind})"
            raise CheckpointError(f"sparse optimizer state: {key!r} {where}; {len(own)} tensors are needed, {len(state)} were given")
        for key, value in own.items():
            if value.shape != state[key].shape:
                met, needed = tuple(state[key].shape), tuple(value.shape)
                raise CheckpointError(f"sparse optimizer state: {key!r} has shape {met}, {needed} is needed")
        for key, value in own.items():
            value.copy_(state[key])


def sparse_optimizer(collection: EmbeddingCollection, config: SparseOptimizerConfig) -> SparseOptimizer:
    """Optimizer of a sparse collection; raises SpecError for a dense one or an unknown table in `table_lr`."""
    return SparseOptimizer(collection, config)


def clip_grad_norm_(parameters: Iterable[nn.Parameter], sparse: SparseOptimizer | None, max_norm: float) -> Tensor:
    """Scale dense and sparse gradients together so that their joint L2 norm is at most `max_norm`; returns the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    if sparse is not None:
        norms.append(sparse.grad_norm())
    if not norms:
        return torch.zeros(())
    total = _norm(norms)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    if sparse is not None:
        sparse.scale_grad_(factor)
    return total


def _norm(norms: list[Tensor]) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
