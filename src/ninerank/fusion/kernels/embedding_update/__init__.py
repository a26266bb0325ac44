"""Backward of a lookup fused with the optimizer: each touched row is read, summed for, updated and written once.

For every row r that occurs in rows_N, with table t (first_row_T[t] <= r < first_row_T[t + 1]) and lr = lr_T[t]:

    g = sum over n with row_n = r of s_n * grad[g_n, :]       once, in the order of n
    weight[r], state[r] <- the optimizer's rule for (weight[r], state[r], g, lr); see `optimizers`

weight_RD: float32, float16 or bfloat16 (R, D), changed in place; arithmetic is float32, rounding to nearest even.
state: the optimizer's tensors (`RowOptimizer.new_state`), changed in place. grad_GD, rows_N, grad_row_N, scale_N: as in
`embedding_reduce`. first_row_T: int64, ascending from 0. lr_T: float32, on the storage's device: a tensor, so that a schedule
compiles once. grad_scale: float32 () factor on every sum, as a clip by global norm gives, or None.
A row outside the storage raises IndexError on CPU, before anything is changed.

Deterministic: a row is summed and updated by one thread, in the order of the batch, whatever the number of threads; the
result is the same bit for bit on one machine (another processor may fuse multiply and add differently).
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: exact fused optimizers of FBGEMM's table-batched embedding (Khudia et al. 2021, arXiv:2101.05615).

N entries, G outputs, R rows, D embedding dim, T tables.
"""

import torch
from torch import Tensor

from ninerank.errors import SpecError, nearest
from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_reduce import check_entries
from ninerank.fusion.kernels.embedding_update.optimizers import FTRL, SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad, row_optimizers
from ninerank.fusion.kernels.embedding_update.reference import reference

__all__ = ["FTRL", "SGD", "Adagrad", "Adam", "RowOptimizer", "RowwiseAdagrad", "embedding_update", "reference", "row_optimizers"]


def embedding_update(
    weight_RD: Tensor,
    state: list[Tensor],
    grad_GD: Tensor,
    rows_N: Tensor,
    first_row_T: Tensor,
    lr_T: Tensor,
    optimizer: RowOptimizer,
    *,
    grad_row_N: Tensor | None = None,
    scale_N: Tensor | None = None,
    grad_scale: Tensor | None = None,
    kernel: str = registry.AUTO,
) -> None:
    """Update the touched rows and their state in place; see the module's contract.

    >>> weight, lr = torch.ones(4, 2), torch.tensor([0.5])
    >>> grad, rows = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([3, 3])
    >>> embedding_update(weight, [], grad, rows, torch.tensor([0]), lr, SGD(), kernel="torch")
    >>> weight[3]
    tensor([0., 0.])
    """
    kind: str = optimizer.kind  # type: ignore[attr-defined]  # every subclass has its own literal
    arguments = (grad_GD.contiguous(), rows_N, grad_row_N, scale_N, first_row_T, lr_T, grad_scale, kind, optimizer.hyper, kernel)
    _operator(weight_RD.detach(), state, *arguments)


@torch.library.custom_op("ninerank::embedding_update", mutates_args=("weight_RD", "state"))
def _operator(
    weight_RD: Tensor,
    state: list[Tensor],
    grad_GD: Tensor,
    rows_N: Tensor,
    grad_row_N: Tensor | None,
    scale_N: Tensor | None,
    first_row_T: Tensor,
    lr_T: Tensor,
    grad_scale: Tensor | None,
    optimizer: str,
    hyper: list[float],
    kernel: str = registry.AUTO,
) -> None:
    check_entries(grad_GD, rows_N, grad_row_N, scale_N)
    _check(weight_RD, state, grad_GD, first_row_T, lr_T, optimizer)
    run = registry.choose("embedding_update", weight_RD.device.type, kernel)
    run(weight_RD, state, grad_GD, rows_N, grad_row_N, scale_N, first_row_T, lr_T, grad_scale, optimizer, hyper)


def _check(weight_RD: Tensor, state: list[Tensor], grad_GD: Tensor, first_row_T: Tensor, lr_T: Tensor, optimizer: str) -> None:
    if optimizer not in row_optimizers():
        raise SpecError(f"no row optimizer {optimizer!r}; {nearest(optimizer, row_optimizers())}")
    if weight_RD.dim() != 2 or not weight_RD.is_contiguous() or grad_GD.shape[1] != weight_RD.shape[1]:
        raise ValueError(
            f"the storage has shape {tuple(weight_RD.shape)}, gradients {tuple(grad_GD.shape)}; a contiguous (rows, dim), one dim needed"
        )
    names = row_optimizers()[optimizer].state_names
    if len(state) != len(names):
        raise ValueError(f"{optimizer} has state {names}; {len(state)} tensors were given")
    for name, tensor in zip(names, state, strict=True):
        if tensor.shape[0] != weight_RD.shape[0] or not tensor.is_contiguous() or (tensor.dim() == 2 and tensor.shape != weight_RD.shape):
            raise ValueError(f"state {name!r} has shape {tuple(tensor.shape)}; contiguous and {weight_RD.shape[0]} rows needed")
    if first_row_T.numel() != lr_T.numel() or lr_T.numel() == 0:
        raise ValueError(f"{first_row_T.numel()} tables and {lr_T.numel()} learning rates; one each is needed")


for _kernel in (
    registry.Kernel("embedding_update", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("embedding_update", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("embedding_update", "torch", f"{__name__}.reference", "reference"),
):
    registry.register(_kernel)
