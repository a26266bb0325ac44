"""Memory for a table's rows: on Linux in huge pages, so that a random row costs no walk of the page table.

Looking rows up touches a page a row. With pages of 4 KiB the address translation misses almost every time; with 2 MiB
a lookup over a few hundred MB of rows is about 1.5 times as fast. Asking is only a hint: where the kernel has
`transparent_hugepage` switched off, nothing changes.
"""

import mmap
import sys

import torch
from torch import Tensor

__all__ = ["zeros"]

HUGE_PAGE_BYTES = 1 << 21


def zeros(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of zeros for a table's rows or its optimizer's state.

    >>> zeros((3, 2)).sum()
    tensor(0.)
    """
    place = torch.device(device)
    num_elements = torch.Size(shape).numel()
    if place.type != "cpu" or sys.platform != "linux" or num_elements * dtype.itemsize < 2 * HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=place)
    # Private, so that a forked child writes to a copy as with any other tensor; anonymous memory is zero.
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements).view(shape)
