"""Collective calls beside TorchRec's: sums, touched rows of every process, rows from each process to each other one.

Shape legend: K rows of one process, D columns, W processes, T tables.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from ninerank.fusion.lookup import LookupGrad

__all__ = ["by_process", "by_table", "gather_rows", "global_sum", "swap", "swap_sizes"]


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


def swap_sizes(size_WT: Tensor) -> Tensor:
    """What every process has for this one (int64 (W, T), on the host), from what this one has for every process."""
    received_WT = torch.empty_like(size_WT)
    dist.all_to_all_single(received_WT, size_WT.contiguous())
    return received_WT


def swap(row_K: Tensor, sent_WT: Tensor, received_WT: Tensor, wire: torch.dtype | None = None) -> Tensor:
    """Rows of all processes for this one, from its rows for all of them, each in the order of the processes.

    wire: type in which floating-point rows travel; bytes travel, so that every backend takes every type.
    """
    sent = row_K if wire is None else row_K.to(wire)
    sent = sent.contiguous().view(torch.uint8)
    received = sent.new_empty(int(received_WT.sum()), *sent.shape[1:])
    dist.all_to_all_single(received, sent, received_WT.sum(1).tolist(), sent_WT.sum(1).tolist())
    rows = received.view(row_K.dtype if wire is None else wire)
    return rows.to(row_K.dtype)


def by_process(of_tables: Sequence[Tensor], size_WT: Tensor) -> Tensor:
    """One message: for each process the rows of every table, from the rows of each table in the order of the processes.

    >>> by_process([torch.tensor([1, 2, 3]), torch.tensor([7, 8])], torch.tensor([[2, 1], [1, 1]])).tolist()
    [1, 2, 7, 3, 8]
    """
    pieces = [torch.split_with_sizes(rows, size_W.tolist()) for rows, size_W in zip(of_tables, size_WT.unbind(1), strict=True)]
    return torch.cat([piece for of_process in zip(*pieces, strict=True) for piece in of_process])


def by_table(message: Tensor, size_WT: Tensor) -> list[Tensor]:
    """The rows of each table in the order of the processes, from such a message.

    >>> [rows.tolist() for rows in by_table(torch.tensor([1, 2, 7, 3, 8]), torch.tensor([[2, 1], [1, 1]]))]
    [[1, 2, 3], [7, 8]]
    """
    pieces, num_tables = torch.split_with_sizes(message, size_WT.reshape(-1).tolist()), size_WT.shape[1]
    return [torch.cat(pieces[table::num_tables]) for table in range(num_tables)]
