"""The optimizer of sparse tables: only the rows that a step touched change.

Gradients wait in the tables (`PendingGradients`) until `step`, so that they can be clipped by their norm, together with the tower's;
then each storage is updated in one fused pass (`fusion.kernels.embedding_update`, which states the rules).

Shape legend: V rows of a group, K touched rows, T tables, D embedding dim.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ninerank.config import Config
from ninerank.embedding.collection import EmbeddingCollection
from ninerank.embedding.pending import PendingGradients
from ninerank.embedding.table import TableGroup
from ninerank.errors import CheckpointError, SpecError, nearest
from ninerank.fusion.kernels.embedding_update import RowOptimizer, row_optimizers

__all__ = ["SparseOptimizer", "SparseOptimizerConfig", "clip_grad_norm_", "sparse_optimizer"]


class SparseOptimizerConfig(Config):
    """Update rule of sparse tables; `table_lr` overrides `lr` for the tables it names.

    weight_decay: L2 on touched rows. max_gradient, max_row_norm: bounds on each element and on the norm of a row's gradient. The rest
    belongs to single rules, each with its own default: eps (rowwise_adagrad, adagrad, adam), initial_accumulator (the Adagrads, ftrl),
    beta1 and beta2 (adam), beta, l1 and l2 (ftrl).
    """

    kind: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "ftrl"] = "rowwise_adagrad"
    lr: float = Field(default=0.05, gt=0.0, allow_inf_nan=False)
    table_lr: dict[str, float] = Field(default_factory=dict)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    max_gradient: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    max_row_norm: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    eps: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    initial_accumulator: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    beta1: float | None = Field(default=None, ge=0.0, lt=1.0)
    beta2: float | None = Field(default=None, ge=0.0, lt=1.0)
    beta: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    l1: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    l2: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _settings_of_the_rule(self) -> Self:
        taken = row_optimizers()[self.kind].model_fields.keys() - {"kind"}
        for name in self._settings():
            if name not in taken:
                raise ValueError(f"{name!r} is no setting of {self.kind}, which takes {', '.join(['lr', 'table_lr', *sorted(taken)])}")
        return self

    def _settings(self) -> dict[str, Any]:
        own = self.model_dump(exclude={"kind", "lr", "table_lr"})
        return {name: value for name, value in own.items() if value is not None}

    @property
    def rule(self) -> RowOptimizer:
        """The rule with its settings, the defaults of its own where none is given."""
        return row_optimizers()[self.kind](**self._settings())

    def lr_of(self, table: str) -> float:
        """Learning rate of a table."""
        return self.table_lr.get(table, self.lr)

    def check_tables(self, tables: Collection[str]) -> None:
        """Raise SpecError for a learning rate of a table that is none of these, or that is no finite number above 0."""
        for table, lr in self.table_lr.items():
            if table not in tables:
                raise SpecError(f"table_lr: unknown table {table!r}; {nearest(table, tables)}")
            if not 0.0 < lr < float("inf"):
                raise SpecError(f"table_lr: {table} = {lr}; a finite number above 0 is needed")


class SparseOptimizer:
    """Applies the gradients that backward passes left in a sparse collection.

    Any number of forward and backward passes may precede a step: their gradients add up, as in dense parameters.
    `lr_scale` multiplies every learning rate; a schedule sets it.
    """

    def __init__(self, collection: EmbeddingCollection, config: SparseOptimizerConfig) -> None:
        if collection.config.mode != "sparse":
            raise SpecError(f"a sparse optimizer needs embedding mode 'sparse', this collection's is {collection.config.mode!r}")
        config.check_tables((*collection.layout.names, *collection.managed))
        self.config = config
        self.lr_scale = 1.0
        self._rule = config.rule
        self._groups = collection.named_groups() if collection.layout.names else []
        self._managed, self._tiers = collection.managed, collection.tiers
        layout = collection.layout
        device = self._groups[0][1].storage.device if self._groups else torch.device("cpu")
        self._device = device
        self._first_row_T = torch.tensor(layout.offsets, dtype=torch.int64, device=device)
        self._lr_T = torch.tensor([config.lr_of(name) for name in layout.names], dtype=torch.float32, device=device)
        self._state = {name: self._new_state(group) for name, group in self._groups}
        for name, managed in self._managed.items():
            managed.train_with(self._rule, config.lr_of(name))

    def _new_state(self, group: TableGroup) -> dict[str, Tensor]:
        lr_R = self._lr_T[:1]
        if self.config.table_lr:
            lr_R = self._lr_T.repeat_interleave(torch.tensor(group.layout.num_rows, device=self._device))
        return dict(zip(self._rule.state_names, self._rule.new_state(group.storage, lr_R), strict=True))

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for _, group in self._groups:
            group.gradients.clear()
        for table in self._managed.values():
            table.zero_grad()

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per storage with any: touched rows in rising order (K,), and their summed gradients (K, D).

        A storage is named by its group, that of a managed table `<group>.<table>`.
        """
        found = ((name, pending.coalesced(num_rows)) for name, pending, num_rows in self._pending())
        return {name: (grad.rows_N, grad.grad_GD) for name, grad in found if grad is not None}

    def _pending(self) -> Iterator[tuple[str, PendingGradients, int]]:
        for name, group in self._groups:
            yield name, group.gradients, group.layout.total_rows
        for table in self._managed.values():
            for group_name, gradients in table.gradients.items():
                yield f"{group_name}.{table.name}", gradients, table.num_rows(group_name)

    def grad_norm(self) -> Tensor:
        """L2 norm over all touched rows of all storages, duplicates summed first; a scalar."""
        norms = [torch.linalg.vector_norm(grad_KD).to(self._device) for _, grad_KD in self.gradients().values()]
        return _norm(norms) if norms else torch.zeros((), device=self._device)

    def scale_grad_(self, factor: float | Tensor) -> None:
        """Multiply all gradients."""
        for _, pending, _ in self._pending():
            pending.scale_(factor)

    @torch.no_grad()
    def step(self) -> None:
        """Update the touched rows; call `zero_grad` before the next backward."""
        lr_T = self._lr_T * self.lr_scale
        for name, group in self._groups:
            group.gradients.apply(group.storage, list(self._state[name].values()), self._first_row_T, lr_T, self._rule)
        for table in self._managed.values():
            table.update(self.lr_scale)

    def state_dict(self, *, reading: bool = False) -> dict[str, Tensor]:
        """Plain tensors under `<group>.<table>.<state>`, views of the state; reading: to be filled in place.

        Tables whose state is by id keep theirs (`ManagedTable.state`).
        """
        found = {
            f"{name}.{table}.{key}": value[rows]
            for name, group in self._groups
            for key, value in self._state[name].items()
            for table, rows in group.layout.items()
        }
        for name, tier in self._tiers.items():
            columns = tier.state_to_fill() if reading else tier.state()
            places = [(group, key) for group in tier.dims for key in self._rule.state_names]
            found |= {f"{group}.{name}.{key}": columns[f"state.{group}.{key}"] for group, key in places}
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state as `state_dict` gives it, in any order of tables, or such views after they were filled.

        Raises CheckpointError and changes nothing if it does not fit.
        """
        own = self.state_dict(reading=True)
        for key in sorted(own.keys() ^ state.keys()):
            where = "is missing" if key in own else f"is not of this optimizer ({self.config.kind})"
            raise CheckpointError(f"sparse optimizer state: {key!r} {where}; {len(own)} tensors are needed, {len(state)} were given")
        for key, value in own.items():
            if value.shape != state[key].shape:
                met, needed = tuple(state[key].shape), tuple(value.shape)
                raise CheckpointError(f"sparse optimizer state: {key!r} has shape {met}, {needed} is needed")
        for key, value in own.items():
            if value.data_ptr() != state[key].data_ptr():
                value.copy_(state[key])


def sparse_optimizer(collection: EmbeddingCollection, config: SparseOptimizerConfig) -> SparseOptimizer:
    """Optimizer of a sparse collection; raises SpecError for a dense one or an unknown table in `table_lr`."""
    return SparseOptimizer(collection, config)


class TableGradients(Protocol):
    """Gradients of tables that wait for their optimizer's step."""

    def grad_norm(self) -> Tensor:
        """L2 norm of all, a scalar."""

    def scale_grad_(self, factor: Tensor) -> None:
        """Multiply all."""


def clip_grad_norm_(parameters: Iterable[nn.Parameter], sparse: TableGradients | None, max_norm: float) -> Tensor:
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
