"""Inner products of all pairs of fields, without a matrix of the pairs.

    out[b, p] = <v_f, v_g>        pairs f > g in the order (1, 0), (2, 0), (2, 1), ...: p = f (f - 1) / 2 + g

fields_BFD: (B, F, D). Returns (B, P), P = F (F - 1) / 2. float32 (float64: the reference).
Gradient, by `dot_interaction_backward`: dv_f = sum over g of (the gradient of pair f, g) v_g.
Deterministic: every output is written by one thread, sums in one order.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019.

B rows, F fields, D embedding dim, P pairs.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.jagged import kernel_for

__all__ = ["backward_reference", "dot_interaction", "num_pairs", "reference"]


def dot_interaction(fields_BFD: Tensor, *, kernel: str = registry.AUTO) -> Tensor:
    """Inner products of all pairs (B, P); see the module's contract.

    >>> dot_interaction(torch.tensor([[[1.0, 2.0], [3.0, 1.0], [0.0, 2.0]]]), kernel="torch")
    tensor([[5., 4., 2.]])
    """
    out: Tensor = _operator(fields_BFD, kernel)
    return out


def num_pairs(num_fields: int) -> int:
    """P."""
    return num_fields * (num_fields - 1) // 2


def reference(fields_BFD: Tensor) -> Tensor:
    """The contract in plain torch operators."""
    row_P, column_P = torch.tril_indices(fields_BFD.shape[1], fields_BFD.shape[1], offset=-1, device=fields_BFD.device)
    return torch.bmm(fields_BFD, fields_BFD.transpose(1, 2))[:, row_P, column_P]


def backward_reference(grad_BP: Tensor, fields_BFD: Tensor) -> Tensor:
    """Gradient of the fields in plain torch operators."""
    num_rows, num_fields, _ = fields_BFD.shape
    row_P, column_P = torch.tril_indices(num_fields, num_fields, offset=-1, device=fields_BFD.device)
    grad_BFF = grad_BP.new_zeros(num_rows, num_fields, num_fields)
    grad_BFF[:, row_P, column_P] = grad_BP
    return torch.bmm(grad_BFF + grad_BFF.transpose(1, 2), fields_BFD)


@torch.library.custom_op("ninerank::dot_interaction", mutates_args=())
def _operator(fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    if fields_BFD.dim() != 3:
        raise ValueError(f"fields are {tuple(fields_BFD.shape)}; (B, F, D) is needed")
    run = registry.choose("dot_interaction", fields_BFD.device.type, kernel_for(kernel, fields=fields_BFD))
    out: Tensor = run(fields_BFD.contiguous())
    return out


@_operator.register_fake
def _fake(fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    return fields_BFD.new_empty((fields_BFD.shape[0], num_pairs(fields_BFD.shape[1])))


@torch.library.custom_op("ninerank::dot_interaction_backward", mutates_args=())
def _backward_operator(grad_BP: Tensor, fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    name = kernel_for(kernel, grad=grad_BP, fields=fields_BFD)
    grad_BFD: Tensor = registry.choose("dot_interaction_backward", fields_BFD.device.type, name)(
        grad_BP.contiguous(), fields_BFD.contiguous()
    )
    return grad_BFD


@_backward_operator.register_fake
def _backward_fake(grad_BP: Tensor, fields_BFD: Tensor, kernel: str = registry.AUTO) -> Tensor:
    return fields_BFD.new_empty(fields_BFD.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    fields_BFD, ctx.kernel = inputs
    ctx.save_for_backward(fields_BFD)


def _backward(ctx: Any, grad_BP: Tensor) -> tuple[Tensor, None]:
    return _backward_operator(grad_BP, *ctx.saved_tensors, ctx.kernel), None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("dot_interaction", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("dot_interaction", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("dot_interaction", "torch", __name__, "reference"),
    registry.Kernel("dot_interaction_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("dot_interaction_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("dot_interaction_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
