"""A target beside every position of its history: what an attention unit looks at, without padding.

    out[n, :] = [q_b, k_n, q_b * k_n]        b the history that position n is in

query_BD: (B, D). key_ND: (N, D), history after history. offsets: int32 or int64 (B + 1,), from 0 to N (checked on CPU). Returns (N, 3 D).
float32 (float64: the reference). A unit that also looks at q - k needs no more: it is linear in q and k, so that its
weights fold, W [q, k, q - k, q * k] = (W_q + W_d) q + (W_k - W_d) k + W_p (q * k).

Gradient: dk_n = g_k + q_b * g_p and dq_b = sum over its history of g_q + k_n * g_p, in the order of n; `jagged_pairs_backward`.
Deterministic: every output is written once, by one thread.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: the attention unit of Zhou et al., Deep Interest Network, KDD 2018; jagged tensors as in TorchRec.

B histories, N positions, D embedding dim.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.jagged import check_offsets, history_of, kernel_for

__all__ = ["backward_reference", "jagged_pairs", "reference"]


def jagged_pairs(query_BD: Tensor, key_ND: Tensor, offsets: Tensor, *, kernel: str = registry.AUTO) -> Tensor:
    """[q, k, q * k] (N, 3 D) of every position; see the module's contract.

    >>> jagged_pairs(torch.tensor([[2.0], [3.0]]), torch.tensor([[4.0], [5.0]]), torch.tensor([0, 0, 2]), kernel="torch")
    tensor([[ 3.,  4., 12.],
            [ 3.,  5., 15.]])
    """
    out: Tensor = _operator(query_BD, key_ND, offsets, kernel)
    return out


def reference(query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> Tensor:
    """The contract in plain torch operators."""
    query_ND = query_BD.index_select(0, history_of(offsets, key_ND.shape[0]))
    return torch.cat([query_ND, key_ND, query_ND * key_ND], dim=1)


def backward_reference(grad: Tensor, query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query (B, D) and key (N, D) in plain torch operators."""
    history_N = history_of(offsets, key_ND.shape[0])
    of_query_ND, of_key_ND, of_product_ND = grad.chunk(3, dim=1)
    query_grad_BD = torch.zeros_like(query_BD).index_add_(0, history_N, of_query_ND + key_ND * of_product_ND)
    return query_grad_BD, of_key_ND + query_BD.index_select(0, history_N) * of_product_ND


@torch.library.custom_op("ninerank::jagged_pairs", mutates_args=())
def _operator(query_BD: Tensor, key_ND: Tensor, offsets: Tensor, kernel: str = registry.AUTO) -> Tensor:
    _check(query_BD, key_ND, offsets)
    run = registry.choose("jagged_pairs", key_ND.device.type, kernel_for(kernel, query=query_BD, key=key_ND))
    out: Tensor = run(query_BD.contiguous(), key_ND.contiguous(), offsets.contiguous())
    return out


@_operator.register_fake
def _fake(query_BD: Tensor, key_ND: Tensor, offsets: Tensor, kernel: str = registry.AUTO) -> Tensor:
    return key_ND.new_empty((key_ND.shape[0], 3 * key_ND.shape[1]))


@torch.library.custom_op("ninerank::jagged_pairs_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, query_BD: Tensor, key_ND: Tensor, offsets: Tensor, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    _check(query_BD, key_ND, offsets)
    if grad.shape != (key_ND.shape[0], 3 * key_ND.shape[1]) or grad.dtype != key_ND.dtype:
        raise ValueError(f"the gradient is {grad.dtype} {tuple(grad.shape)}, not {key_ND.dtype} {(key_ND.shape[0], 3 * key_ND.shape[1])}")
    run = registry.choose("jagged_pairs_backward", key_ND.device.type, kernel_for(kernel, query=query_BD, key=key_ND))
    query_grad_BD, key_grad_ND = run(grad.contiguous(), query_BD.contiguous(), key_ND.contiguous(), offsets.contiguous())
    return query_grad_BD, key_grad_ND


@_backward_operator.register_fake
def _backward_fake(grad: Tensor, query_BD: Tensor, key_ND: Tensor, offsets: Tensor, kernel: str = registry.AUTO) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_BD, memory_format=torch.contiguous_format), torch.empty_like(
        key_ND, memory_format=torch.contiguous_format
    )


def _check(query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> None:
    if query_BD.dim() != 2 or key_ND.dim() != 2 or query_BD.shape[1] != key_ND.shape[1]:
        raise ValueError(f"queries are {tuple(query_BD.shape)}, keys {tuple(key_ND.shape)}; (B, D) and (N, D) are needed")
    check_offsets(offsets, query_BD.shape[0], key_ND.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query_BD, key_ND, offsets, ctx.kernel = inputs
    ctx.save_for_backward(query_BD, key_ND, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query_grad_BD, key_grad_ND = _backward_operator(grad, *ctx.saved_tensors, ctx.kernel)
    return query_grad_BD, key_grad_ND, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("jagged_pairs", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("jagged_pairs", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("jagged_pairs", "torch", __name__, "reference"),
    registry.Kernel("jagged_pairs_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("jagged_pairs_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("jagged_pairs_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
