"""How long to train and at which learning rate: pure functions of the step and of what was counted so far."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ninerank.config import Config

__all__ = ["ConstantLr", "CosineLr", "EarlyStopping", "LrConfig", "PlateauLr", "ScheduleConfig", "WarmupLr", "is_gain", "learning_rate"]

Metric = Literal["auc", "gauc", "logloss"]


class ConstantLr(Config):
    """The base learning rate throughout."""

    kind: Literal["constant"] = "constant"


class WarmupLr(Config):
    """A linear rise over `steps`, then the base learning rate."""

    kind: Literal["warmup"]
    steps: PositiveInt


class PlateauLr(Config):
    """Times `factor` after each epoch without gain in the early-stopping metric, never below `min_lr`."""

    kind: Literal["reduce_on_plateau"]
    factor: float = Field(0.1, gt=0.0, lt=1.0)
    min_lr: NonNegativeFloat = 1e-6


class CosineLr(Config):
    """A linear rise over `warmup_steps`, then half a cosine down to `min_lr` at the last step (Loshchilov and Hutter 2017)."""

    kind: Literal["cosine"]
    warmup_steps: NonNegativeInt = 0
    min_lr: NonNegativeFloat = 0.0


LrConfig = Annotated[ConstantLr | WarmupLr | PlateauLr | CosineLr, Field(discriminator="kind")]


class EarlyStopping(Config):
    """Stop after `patience` epochs in a row whose validation metric is not better than the best by more than `min_delta`."""

    metric: Metric = "auc"
    patience: PositiveInt = 2
    min_delta: NonNegativeFloat = 1e-6


class ScheduleConfig(Config):
    """Epochs, early stopping, learning rate and gradient clipping.

    early_stopping: `null` trains all epochs; the best epoch (by AUC) is kept all the same.
    max_steps: ends training early, wherever in an epoch that is. clip_norm: bound on the L2 norm of all gradients together.
    """

    epochs: PositiveInt = 10
    max_steps: PositiveInt | None = None
    early_stopping: EarlyStopping | None = EarlyStopping()
    lr: LrConfig = ConstantLr()
    clip_norm: PositiveFloat | None = None


def learning_rate(config: LrConfig, base_lr: float, *, step: int, total_steps: int, reductions: int) -> float:
    """Learning rate of step `step` (from 0); `reductions` counts the epochs without gain so far.

    >>> [learning_rate(WarmupLr(kind="warmup", steps=4), 1.0, step=s, total_steps=9, reductions=0) for s in (0, 1, 3, 8)]
    [0.25, 0.5, 1.0, 1.0]
    >>> learning_rate(PlateauLr(kind="reduce_on_plateau"), 1e-3, step=0, total_steps=9, reductions=8)
    1e-06
    >>> [round(learning_rate(CosineLr(kind="cosine"), 1.0, step=s, total_steps=5, reductions=0), 3) for s in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if isinstance(config, WarmupLr):
        return base_lr * min(1.0, (step + 1) / config.steps)
    if isinstance(config, PlateauLr):
        return max(base_lr * config.factor**reductions, min(config.min_lr, base_lr))
    if isinstance(config, CosineLr):
        if step < config.warmup_steps:
            return base_lr * (step + 1) / config.warmup_steps
        share = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
        low = min(config.min_lr, base_lr)
        return low + (base_lr - low) * 0.5 * (1.0 + math.cos(math.pi * share))
    return base_lr


def is_gain(metric: Metric, value: float | None, best: float | None, min_delta: float) -> bool:
    """Whether `value` is better than `best` by more than `min_delta`; None is an undefined metric, which anything beats.

    >>> is_gain("auc", 0.8, 0.7, 0.0), is_gain("logloss", 0.8, 0.7, 0.0), is_gain("auc", 0.5, None, 0.0)
    (True, False, True)
    """
    if best is None or value is None:
        return best is None
    return best - value > min_delta if metric == "logloss" else value - best > min_delta
