"""Gradient of looked-up rows: entries of one row summed exactly once.

    sums[u, :] = sum over n with row_n = unique[u] of s_n * grad[g_n, :]

grad_GD: float32 (G, D), gradients of the lookup's outputs. rows_N: int32 or int64 rows of a storage of `num_rows`. grad_row_N:
int32, the output g_n that entry n went into (None: g_n = n). scale_N: float32 s_n (None: 1); `bag_entries` and
`sequence_entries` make both. Returns (unique_U, sums_UD): the touched rows in ascending order, and float32 sums.
A row outside the storage or an output outside [0, G) raises IndexError on CPU.

This is the (coalesced) sparse gradient: it is what a clip by global norm needs, and `embedding_update` with
grad_GD = sums_UD, rows_N = unique_U then applies it.
Deterministic: entries are summed in the order of n after a stable sort, each row by one thread.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).

N entries, G outputs, D embedding dim, U touched rows.
"""

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry

__all__ = ["check_entries", "embedding_reduce", "reference"]


def embedding_reduce(
    grad_GD: Tensor,
    rows_N: Tensor,
    grad_row_N: Tensor | None,
    scale_N: Tensor | None,
    num_rows: int,
    *,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor]:
    """Touched rows and their summed gradients; see the module's contract.

    >>> grad = torch.tensor([[1.0], [2.0], [4.0]])
    >>> embedding_reduce(grad, torch.tensor([5, 3, 5]), None, None, 9, kernel="torch")
    (tensor([3, 5]), tensor([[2.],
            [5.]]))
    """
    unique_U, sums_UD = _operator(grad_GD.contiguous(), rows_N, grad_row_N, scale_N, num_rows, kernel)
    return unique_U, sums_UD


def reference(grad_GD: Tensor, rows_N: Tensor, grad_row_N: Tensor | None, scale_N: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """The contract in plain torch operators; float64 gradients stay float64."""
    grad_ND = grad_GD if grad_row_N is None else grad_GD[grad_row_N.to(torch.int64)]
    if scale_N is not None:
        grad_ND = grad_ND * scale_N.to(grad_ND.dtype)[:, None]
    unique_U, unique_N = torch.unique(rows_N, sorted=True, return_inverse=True)
    if unique_U.numel() and not 0 <= int(unique_U[0]) <= int(unique_U[-1]) < num_rows:
        raise IndexError(f"rows {int(unique_U[0])} to {int(unique_U[-1])} are not all in the storage of {num_rows} rows")
    sums_UD = grad_ND.new_zeros(unique_U.numel(), grad_GD.shape[1])
    return unique_U, sums_UD.index_add_(0, unique_N, grad_ND)


def check_entries(grad_GD: Tensor, rows_N: Tensor, grad_row_N: Tensor | None, scale_N: Tensor | None) -> None:
    """Raise ValueError where the shapes or types of entries do not fit together."""
    if grad_GD.dim() != 2 or not grad_GD.is_contiguous():
        raise ValueError(f"gradients have shape {tuple(grad_GD.shape)}, strides {grad_GD.stride()}; a contiguous (outputs, dim) is needed")
    if rows_N.dim() != 1 or rows_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows are {rows_N.dtype} of shape {tuple(rows_N.shape)}; one dimension of torch.int32 or torch.int64 is needed")
    if grad_row_N is None and grad_GD.shape[0] != rows_N.shape[0]:
        raise ValueError(f"{rows_N.shape[0]} entries and {grad_GD.shape[0]} gradients: without grad_row_N one gradient an entry is needed")
    if grad_row_N is not None and (grad_row_N.shape != rows_N.shape or grad_row_N.dtype != torch.int32):
        raise ValueError(f"grad_row_N is {grad_row_N.dtype} {tuple(grad_row_N.shape)}; torch.int32 {tuple(rows_N.shape)} is needed")
    if scale_N is not None and scale_N.shape != rows_N.shape:
        raise ValueError(f"scale_N has shape {tuple(scale_N.shape)}; {tuple(rows_N.shape)} is needed")


@torch.library.custom_op("ninerank::embedding_reduce", mutates_args=())
def _operator(
    grad_GD: Tensor, rows_N: Tensor, grad_row_N: Tensor | None, scale_N: Tensor | None, num_rows: int, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    check_entries(grad_GD, rows_N, grad_row_N, scale_N)
    run = registry.choose("embedding_reduce", grad_GD.device.type, kernel)
    unique_U, sums_UD = run(grad_GD, rows_N, grad_row_N, scale_N, num_rows)
    return unique_U, sums_UD


@_operator.register_fake
def _fake(
    grad_GD: Tensor, rows_N: Tensor, grad_row_N: Tensor | None, scale_N: Tensor | None, num_rows: int, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    num_unique = torch.library.get_ctx().new_dynamic_size()
    return rows_N.new_empty(num_unique), grad_GD.new_empty(num_unique, grad_GD.shape[1])


for _kernel in (
    registry.Kernel("embedding_reduce", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("embedding_reduce", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("embedding_reduce", "torch", __name__, "reference"),
):
    registry.register(_kernel)
