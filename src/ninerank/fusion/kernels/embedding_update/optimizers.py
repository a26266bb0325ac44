"""Optimizers that `embedding_update` fuses with the backward pass: their settings and their state per row.

For a touched row w with summed gradient g (duplicates in the batch added up once), first, in this order:

    g <- clip(g, -max_gradient, max_gradient)              where set
    g <- g * min(1, max_row_norm / ||g||)                  where set
    g <- g + weight_decay * w                              L2, on touched rows only

then the optimizer's own rule, with the table's learning rate lr. Rows that the batch does not touch stay as they are
(lazy updates): no decay, no momentum. State is float32 whatever the table's type.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ninerank.config import Config
from ninerank.fusion.kernels import storage

__all__ = ["FTRL", "SGD", "Adagrad", "Adam", "RowOptimizer", "RowwiseAdagrad", "row_optimizers"]

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class RowOptimizer(Config, ABC):
    """What all optimizers have."""

    state_names: ClassVar[tuple[str, ...]] = ()

    weight_decay: NonNegative = 0.0
    max_gradient: Positive | None = None
    max_row_norm: Positive | None = None

    def new_state(self, weight_RD: Tensor, lr_R: Tensor) -> list[Tensor]:
        """State tensors for a storage, in the order of `state_names`; lr_R is each row's learning rate (or one for all)."""
        return []

    @property
    @abstractmethod
    def constants(self) -> tuple[float, ...]:
        """Numbers of the rule, in the order in which the kernels take them."""

    @property
    def hyper(self) -> list[float]:
        """weight_decay, max_gradient, max_row_norm (infinity for none), then the constants."""
        limits = (float("inf") if limit is None else limit for limit in (self.max_gradient, self.max_row_norm))
        return [self.weight_decay, *limits, *self.constants]


class SGD(RowOptimizer):
    """w <- w - lr * g."""

    kind: Literal["sgd"] = "sgd"

    @property
    def constants(self) -> tuple[float, ...]:
        return ()


class Adagrad(RowOptimizer):
    """s <- s + g^2;  w <- w - lr * g / (sqrt(s) + eps), by element.

    Duchi, Hazan, Singer 2011, JMLR 12:2121.
    """

    state_names: ClassVar[tuple[str, ...]] = ("sum",)

    kind: Literal["adagrad"] = "adagrad"
    eps: Positive = 1e-8
    initial_accumulator: NonNegative = 0.0

    def new_state(self, weight_RD: Tensor, lr_R: Tensor) -> list[Tensor]:
        return [_filled(weight_RD, tuple(weight_RD.shape), self.initial_accumulator)]

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.eps,)


class RowwiseAdagrad(RowOptimizer):
    """s <- s + mean(g^2);  w <- w - lr * g / (sqrt(s) + eps), with one s for a row.

    The variant of Adagrad that DLRM training made usual: D times less state (Naumov et al. 2019, arXiv:1906.00091).
    """

    state_names: ClassVar[tuple[str, ...]] = ("sum",)

    kind: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    eps: Positive = 1e-8
    initial_accumulator: NonNegative = 0.0

    def new_state(self, weight_RD: Tensor, lr_R: Tensor) -> list[Tensor]:
        return [_filled(weight_RD, (weight_RD.shape[0],), self.initial_accumulator)]

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.eps,)


class Adam(RowOptimizer):
    """t <- t + 1;  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    Kingma, Ba 2015, arXiv:1412.6980; lazy: t counts the row's own updates, so that a rare row is corrected for its
    own bias and not for the age of the run.
    """

    state_names: ClassVar[tuple[str, ...]] = ("m", "v", "step")

    kind: Literal["adam"] = "adam"
    beta1: Rate = 0.9
    beta2: Rate = 0.999
    eps: Positive = 1e-8

    def new_state(self, weight_RD: Tensor, lr_R: Tensor) -> list[Tensor]:
        shape, device = tuple(weight_RD.shape), weight_RD.device
        return [storage.zeros(shape, device=device), storage.zeros(shape, device=device), storage.zeros(shape[:1], torch.int32, device)]

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.beta1, self.beta2, self.eps)


class FTRL(RowOptimizer):
    """n' = n + g^2;  z <- z + g - w (sqrt(n') - sqrt(n)) / lr;  w <- -shrink(z) / ((beta + sqrt(n')) / lr + l2).

    shrink(z) = sign(z) max(|z| - l1, 0): a coordinate whose |z| stays below l1 is exactly zero.

    FTRL-Proximal, McMahan et al. 2013, KDD (ad click prediction). z starts where the rule gives the initial weights
    back, so that an embedding does not collapse to zero when it is first touched. z depends on lr: keep lr constant.
    """

    state_names: ClassVar[tuple[str, ...]] = ("z", "n")

    kind: Literal["ftrl"] = "ftrl"
    beta: Positive = 1.0
    l1: NonNegative = 0.0
    l2: NonNegative = 0.0
    initial_accumulator: NonNegative = 0.0

    def new_state(self, weight_RD: Tensor, lr_R: Tensor) -> list[Tensor]:
        weight = weight_RD.detach().to(torch.float32)
        lr_R1 = lr_R.to(weight.device, torch.float32).reshape(-1, 1)
        z_RD, n_RD = _filled(weight_RD, tuple(weight_RD.shape), 0.0), _filled(weight_RD, tuple(weight_RD.shape), self.initial_accumulator)
        z_RD.copy_(-weight * ((self.beta + self.initial_accumulator**0.5) / lr_R1 + self.l2) - torch.sign(weight) * self.l1)
        return [z_RD, n_RD]

    @property
    def constants(self) -> tuple[float, ...]:
        return (self.beta, self.l1, self.l2)


def row_optimizers() -> dict[str, type[RowOptimizer]]:
    """All optimizers by kind."""
    return {"sgd": SGD, "adagrad": Adagrad, "rowwise_adagrad": RowwiseAdagrad, "adam": Adam, "ftrl": FTRL}


def _filled(weight_RD: Tensor, shape: tuple[int, ...], value: float) -> Tensor:
    state = storage.zeros(shape, device=weight_RD.device)
    return state.fill_(value) if value else state
