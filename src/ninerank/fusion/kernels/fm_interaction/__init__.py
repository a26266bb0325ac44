"""Pairwise interaction of a factorization machine, without a square of the fields.

    out[b, 0] = sum over f < g of <v_f, v_g> = 1/2 sum over d of ((sum over f of v_fd)^2 - sum over f of v_fd^2)

fields_BFD: (B, F, D). Returns (B, 1). float32 (float64: the reference).
Gradient, by `fm_interaction_backward`: dv_fd = g_b (sum over h of v_hd - v_fd).
Deterministic: a row is summed by one thread, fields in order.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: Rendle, Factorization Machines, ICDM 2010, lemma 3.1.

B rows, F fields, D embedding dim.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.jagged import kernel_for

__all__ = ["backward_reference", "fm_interaction", "reference"]


def fm_interaction(fields_BFD: Tensor, *, kernel: str = registry.AUTO) -> Tensor:
    """Sum of all pairs' inner products (B, 1); see the module's contract.

    >>> fm_interaction(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]]), kernel="torch")
    tensor([[5.]])
    """
    out: Tensor = _operator(fields_BFD, kernel)
    return out


def reference(fields_BFD: Tensor) -> Tensor:
    """The contract in plain torch operators."""
    return 0.5 * (fields_BFD.sum(1).square() - fields_BFD.square().sum(1)).sum(1, keepdim=True)


def backward_reference(grad_B1: Tensor, fields_BFD: Tensor) -> Tensor:
    """Gradient of the fields in plain torch operators."""
    return grad_B1[:, :, None] * (fields_BFD.sum(1, keepdim=True) - fields_BFD)


@torch.library.custom_op("ninerank::fm_interaction", mutates_args=())
def _operator(fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    if fields_BFD.dim() != 3:
        raise ValueError(f"fields are {tuple(fields_BFD.shape)}; (B, F, D) is needed")
    run = registry.choose("fm_interaction", fields_BFD.device.type, kernel_for(kernel, fields=fields_BFD))
    out: Tensor = run(fields_BFD.contiguous())
    return out


@_operator.register_fake
def _fake(fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    return fields_BFD.new_empty((fields_BFD.shape[0], 1))


@torch.library.custom_op("ninerank::fm_interaction_backward", mutates_args=())
def _backward_operator(grad_B1: Tensor, fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    name = kernel_for(kernel, grad=grad_B1, fields=fields_BFD)
    grad_BFD: Tensor = registry.choose("fm_interaction_backward", fields_BFD.device.type, name)(
        grad_B1.contiguous(), fields_BFD.contiguous()
    )
    return grad_BFD


@_backward_operator.register_fake
def _backward_fake(grad_B1: Tensor, fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    return fields_BFD.new_empty(fields_BFD.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    fields_BFD, ctx.kernel = inputs
    ctx.save_for_backward(fields_BFD)


def _backward(ctx: Any, grad_B1: Tensor) -> tuple[Tensor, None]:
    return _backward_operator(grad_B1, *ctx.saved_tensors, ctx.kernel), None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("fm_interaction", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("fm_interaction", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("fm_interaction", "torch", __name__, "reference"),
    registry.Kernel("fm_interaction_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("fm_interaction_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("fm_interaction_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
