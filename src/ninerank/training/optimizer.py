"""One optimizer for a model whose tower and tables may be trained by different rules."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator
from torch import Tensor, nn

from ninerank.config import Config
from ninerank.embedding.collection import EmbeddingCollection
from ninerank.embedding.optimizer import SparseOptimizer, SparseOptimizerConfig, clip_grad_norm_, sparse_optimizer
from ninerank.embedding.sharding.collection import ShardedEmbeddingCollection
from ninerank.embedding.sharding.optimizer import ShardedOptimizer
from ninerank.errors import CheckpointError
from ninerank.training.schedule import LrConfig, learning_rate

__all__ = ["ModelOptimizer", "OptimizerConfig"]


class OptimizerConfig(Config):
    """Update rule of the tower, and in embedding mode `dense` of the tables too; `sparse` is the tables' rule in mode `sparse`.

    eps: the rule's own default unless given. weight_decay: decoupled in adamw, added to the gradient elsewhere; tables in mode `dense`
    take `embedding.l2` instead. momentum: sgd alone. betas: adam and adamw alone.
    """

    kind: Literal["adam", "adamw", "sgd", "adagrad"] = "adam"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    eps: PositiveFloat | None = None
    sparse: SparseOptimizerConfig = SparseOptimizerConfig()

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError("both betas must be at least 0 and below 1")
        return betas


class ModelOptimizer:
    """Zero, clip and step over tower and tables together; the learning rate of both follows one schedule."""

    def __init__(self, tower: nn.Module, embedding: EmbeddingCollection, config: OptimizerConfig) -> None:
        self.config = config
        decayed = [p for p in tower.parameters() if p.requires_grad]
        tables = [p for p in embedding.parameters() if p.requires_grad]
        self.parameters = [*decayed, *tables]
        self.dense = _dense(config, decayed, tables) if self.parameters else None
        self.sparse: SparseOptimizer | ShardedOptimizer | None = None
        if isinstance(embedding, ShardedEmbeddingCollection):
            self.sparse = ShardedOptimizer(embedding, config.sparse)
        elif embedding.config.mode == "sparse":
            self.sparse = sparse_optimizer(embedding, config.sparse)

    def zero_grad(self) -> None:
        if self.dense is not None:
            self.dense.zero_grad(set_to_none=True)
        if self.sparse is not None:
            self.sparse.zero_grad()

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before."""
        return clip_grad_norm_(self.parameters, self.sparse, max_norm)

    def set_lr(self, config: LrConfig, *, step: int, total_steps: int, reductions: int) -> float:
        """Set the schedule's learning rate for `step`; returns the tower's."""

        def at(base_lr: float) -> float:
            return learning_rate(config, base_lr, step=step, total_steps=total_steps, reductions=reductions)

        lr = at(self.config.lr)
        if self.dense is not None:
            for group in self.dense.param_groups:
                group["lr"] = lr
        if self.sparse is not None:
            base = self.sparse.config.lr
            self.sparse.lr_scale = at(base) / base
        return lr

    def step(self) -> None:
        if self.dense is not None:
            self.dense.step()
        if self.sparse is not None:
            self.sparse.step()

    def state_dict(self, *, reading: bool = False) -> dict[str, Any]:
        """State of both; of sharded tables this process's blocks, all that it holds. reading: what of tables is to be filled in place."""
        sparse = None if self.sparse is None else dict(self.sparse.state_dict(reading=reading))
        return {"kind": self.config.kind, "dense": None if self.dense is None else self.dense.state_dict(), "sparse": sparse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, without the blocks of sharded tables, which are filled in place.

        Raises CheckpointError for the state of another optimizer.
        """
        same = state["kind"] == self.config.kind
        if not same or (state["dense"] is None) != (self.dense is None) or (state["sparse"] is None) != (self.sparse is None):
            raise CheckpointError(
                f"optimizer state is of {state['kind']!r}, this run's optimizer is {self.config.kind!r}; resume with the same recipe"
            )
        if self.dense is not None:
            try:
                self.dense.load_state_dict(state["dense"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"optimizer state does not fit the model: {error}") from None
        if isinstance(self.sparse, SparseOptimizer):
            self.sparse.load_state_dict(state["sparse"])


def _dense(config: OptimizerConfig, decayed: Sequence[nn.Parameter], tables: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": list(tables), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    eps: dict[str, Any] = {} if config.eps is None else {"eps": config.eps}
    if config.kind == "adam":
        return torch.optim.Adam(groups, lr=config.lr, betas=config.betas, **eps)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, **eps)
    if config.kind == "adagrad":
        return torch.optim.Adagrad(groups, lr=config.lr, **eps)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
