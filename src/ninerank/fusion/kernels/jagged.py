"""Histories that lie one after another: what the operators on them share.

history b holds the positions offsets[b] ... offsets[b + 1] - 1, offsets (B + 1,) from 0 to N and never falling.
"""

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry

__all__ = ["check_offsets", "expanded", "history_of", "kernel_for"]


def check_offsets(offsets: Tensor, num_histories: int, num_positions: int) -> None:
    """Raise ValueError for offsets that are not B + 1 integers; on CPU also where they do not cut N positions into histories."""
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.shape != (num_histories + 1,):
        raise ValueError(
            f"offsets are {offsets.dtype} of shape {tuple(offsets.shape)}; torch.int32 or torch.int64 ({num_histories + 1},) is needed"
        )
    if offsets.device.type == "cpu":
        first, last = int(offsets[0]), int(offsets[-1])
        if first != 0 or last != num_positions or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets go from {first} to {last}; from 0 to the {num_positions} positions without falling is needed")


def kernel_for(kernel: str, **values: Tensor) -> str:
    """Name of the kernel to take: `auto` is `torch`, the reference, for float64, which it alone knows; ValueError for other types."""
    dtypes = {value.dtype for value in values.values()}
    if dtypes == {torch.float64} and kernel in (registry.AUTO, "torch"):
        return "torch"
    if dtypes != {torch.float32}:
        found = ", ".join(f"{name} {value.dtype}" for name, value in values.items())
        raise ValueError(f"{found}: torch.float32 is needed (torch.float64 for kernel 'torch')")
    return kernel


def history_of(offsets: Tensor, num_positions: int) -> Tensor:
    """History (N,) of every position, of the offsets' type.

    >>> history_of(torch.tensor([0, 2, 2, 3]), 3)
    tensor([0, 0, 2])
    """
    each_B = torch.arange(offsets.shape[0] - 1, dtype=offsets.dtype, device=offsets.device)
    return torch.repeat_interleave(each_B, offsets.diff(), output_size=num_positions)


def expanded(offsets: Tensor, row_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where several candidates share a history: positions (P,) to take one after another, and the offsets (B + 1,) that they then have.

    offsets: (U + 1,) of the histories. row_B: history of each candidate. `keys_ND.index_select(0, positions)` are keys as if every
    candidate had its own.

    >>> expanded(torch.tensor([0, 2, 3]), torch.tensor([1, 0, 1]))
    (tensor([2, 0, 1, 2]), tensor([0, 1, 3, 4]))
    """
    length_B = offsets.diff().index_select(0, row_B)
    own = torch.cat([length_B.new_zeros(1), length_B.cumsum(0)])
    num_positions = int(own[-1])
    shift_P = torch.repeat_interleave(offsets.index_select(0, row_B) - own[:-1], length_B, output_size=num_positions)
    return shift_P + torch.arange(num_positions, dtype=offsets.dtype, device=offsets.device), own
