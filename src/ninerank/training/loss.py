"""The training loss.

Shape legend: B rows, T tasks.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from ninerank.config import Config
from ninerank.errors import SpecError

__all__ = ["LossConfig", "binary_cross_entropy", "check_task_weights"]


class LossConfig(Config):
    """Binary cross-entropy per task; `task_weights` maps label columns to the weight of their loss, 1 where a label is missing."""

    task_weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)


def check_task_weights(config: LossConfig, labels: Sequence[str]) -> tuple[float, ...]:
    """Weight of each label's loss, in the order of `labels`; raises SpecError for a name that is no label.

    >>> check_task_weights(LossConfig(task_weights={"buy": 2}), ["click", "buy"])
    (1.0, 2.0)
    """
    strange = sorted(set(config.task_weights) - set(labels))
    if strange:
        raise SpecError(f"loss.task_weights: {strange[0]!r} is not a label of the spec; labels: {', '.join(labels)}")
    return tuple(config.task_weights.get(label, 1.0) for label in labels)


def binary_cross_entropy(logits_BT: Tensor, label_BT: Tensor, weight_B: Tensor | None = None, task_weights: Sequence[float] = ()) -> Tensor:
    """Scalar: sum over tasks of the weighted mean over rows,

        L = sum_t lambda_t * (sum_b w_b * bce(z_bt, y_bt)) / (sum_b w_b),    bce(z, y) = log(1 + e^z) - y z

    so that doubling all row weights changes nothing, and a batch of weight zero gives zero. Without `weight_B` all w_b = 1, which
    is the mean over rows. Without `task_weights` all lambda_t = 1.

    >>> float(binary_cross_entropy(torch.zeros(4, 1), torch.tensor([[0.0], [1.0], [1.0], [0.0]])))
    0.693147...
    """
    loss_BT = F.binary_cross_entropy_with_logits(logits_BT.float(), label_BT, reduction="none")
    if task_weights and any(weight != 1.0 for weight in task_weights):
        loss_BT = loss_BT * loss_BT.new_tensor(task_weights)
    loss_B = loss_BT.sum(1)
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(torch.finfo(torch.float32).tiny)
