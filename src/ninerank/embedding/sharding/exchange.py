"""Collective calls beside TorchRec's: sums, and touched rows of every process.

Shape legend: K rows of one process, D columns, W processes.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from ninerank.fusion.lookup import LookupGrad

__all__ = ["gather_rows", "global_sum"]


def global_sum(value: Tensor) -> Tensor:
    """Sum over all processes, the same in each; `value` stays as it is."""
    total = value.clone()
    dist.all_reduce(total)
    return total


def gather_rows(own: LookupGrad | None, dim: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Rows and gradients of all processes, one process after the other; None where no process has any.

    own: coalesced gradients of this process. Every process pads to the longest, since not all backends gather parts of unequal size.
    """
    row_K = torch.empty(0, dtype=torch.int64, device=device) if own is None else own.rows_N.long()
    grad_KD = torch.empty(0, dim, device=device) if own is None else own.grad_GD
    count = torch.tensor([row_K.numel()], device=device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(each) for each in counts]
    if not any(sizes):
        return None
    rows = _gather_padded(row_K, max(sizes))
    grads = _gather_padded(grad_KD, max(sizes))
    return (
        torch.cat([part[:size] for part, size in zip(rows, sizes, strict=True)]),
        torch.cat([part[:size] for part, size in zip(grads, sizes, strict=True)]),
    )


def _gather_padded(own: Tensor, length: int) -> list[Tensor]:
    padded = own.new_zeros(length, *own.shape[1:])
    padded[: own.shape[0]] = own
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return parts
