"""Pointwise causal attention of HSTU over histories without padding.

    out[n] = scale * sum over m <= n of the same history of silu(<q_n, k_m> + p_{min(n - m, M - 1)}) v_m

q_NHA, k_NHA: queries and keys (N, H, A), v_NHV: values (N, H, V), history after history. position_M: what a distance adds to the scores, at
least one number; further apart than M - 1 is the last. offsets: int32 or int64 (B + 1,), from 0 to N (checked on CPU). Returns (N, H, V).
float32 (float64: the reference). No score is stored: a history of L positions costs L (L + 1) / 2 pairs and O(L) memory.

Gradient, by `hstu_attention_backward`, with s the score, w = scale silu(s) and ds = scale silu'(s) <g_n, v_m>:
    dq_n = sum ds k_m;  dk_m = sum ds q_n;  dv_m = sum w g_n;  dp_d = sum of ds at distance d
Deterministic: a history is one thread's, and sums of histories go in order.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
The Triton kernels look at one key of every query at a time and use no tensor cores: they save memory and launches, and a head dim
of 64 and more on long histories may be faster by padded matrix products. Biases of time are not part of it.
Prior work: Zhai et al., Actions Speak Louder than Words, ICML 2024, equations 1 to 3 and its jagged kernels.

B histories, N positions, H heads, A width of a query and key, V of a value, M distances.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.jagged import check_offsets, history_of, kernel_for

__all__ = ["backward_reference", "hstu_attention", "places", "reference"]


def hstu_attention(
    q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float, *, kernel: str = registry.AUTO
) -> Tensor:
    """Attended values (N, H, V); see the module's contract.

    >>> q, v = torch.zeros(3, 1, 1), torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    >>> hstu_attention(q, q, v, torch.tensor([10.0]), torch.tensor([0, 2, 3]), 0.1, kernel="torch").flatten()
    tensor([1.0000, 2.9999, 3.9998])
    """
    out: Tensor = _operator(q_NHA, k_NHA, v_NHV, position_M, offsets, scale, kernel)
    return out


def places(offsets: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
    """Of every position (N,) how many stand before it in its history, and how many behind."""
    history_N = history_of(offsets, num_positions).to(torch.int64)
    each_N = torch.arange(num_positions, dtype=offsets.dtype, device=offsets.device)
    return each_N - offsets[history_N], offsets[history_N + 1] - 1 - each_N


def _pairs(q_NHA: Tensor, k_NHA: Tensor, position_M: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (H, N, N), what is seen (N, N), and the place of each pair's distance (N, N)."""
    history_N = history_of(offsets, q_NHA.shape[0])
    place_N = torch.arange(len(history_N), device=offsets.device)
    apart_NN = place_N[:, None] - place_N
    seen_NN = (history_N[:, None] == history_N) & (apart_NN >= 0)
    distance_NN = apart_NN.clamp(0, position_M.shape[0] - 1)
    return torch.einsum("nha,mha->hnm", q_NHA, k_NHA) + position_M[distance_NN], seen_NN, distance_NN


def reference(q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """The contract in plain torch operators, over all pairs of positions."""
    score_HNN, seen_NN, _ = _pairs(q_NHA, k_NHA, position_M, offsets)
    weight_HNN = torch.where(seen_NN, torch.nn.functional.silu(score_HNN) * scale, 0.0)
    return torch.einsum("hnm,mhv->nhv", weight_HNN, v_NHV).contiguous()


def backward_reference(
    grad_NHV: Tensor, q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the biases, in plain torch operators."""
    score_HNN, seen_NN, distance_NN = _pairs(q_NHA, k_NHA, position_M, offsets)
    gate_HNN = torch.sigmoid(score_HNN)
    weight_HNN = torch.where(seen_NN, score_HNN * gate_HNN * scale, 0.0)
    slope_HNN = gate_HNN * (1 + score_HNN * (1 - gate_HNN)) * scale
    of_score_HNN = torch.where(seen_NN, torch.einsum("nhv,mhv->hnm", grad_NHV, v_NHV) * slope_HNN, 0.0)
    of_q, of_k = torch.einsum("hnm,mha->nha", of_score_HNN, k_NHA), torch.einsum("hnm,nha->mha", of_score_HNN, q_NHA)
    of_v = torch.einsum("hnm,nhv->mhv", weight_HNN, grad_NHV)
    of_position_M = torch.zeros_like(position_M).index_add_(0, distance_NN.flatten(), of_score_HNN.sum(0).flatten())
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous(), of_position_M


@torch.library.custom_op("ninerank::hstu_attention", mutates_args=())
def _operator(
    q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float, kernel: str = registry.AUTO
) -> Tensor:
    shapes = [tuple(value.shape) for value in (q_NHA, k_NHA, v_NHV, position_M)]
    if q_NHA.dim() != 3 or shapes[0] != shapes[1] or v_NHV.dim() != 3 or shapes[2][:2] != shapes[0][:2] or position_M.shape[:1] == (0,):
        raise ValueError(f"shapes {', '.join(map(str, shapes))}; (N, H, A), (N, H, A), (N, H, V) and (M,), M at least 1, are needed")
    check_offsets(offsets, offsets.shape[0] - 1, q_NHA.shape[0])
    name = kernel_for(kernel, q=q_NHA, k=k_NHA, v=v_NHV, position=position_M)
    run = registry.choose("hstu_attention", q_NHA.device.type, name)
    values = [value.contiguous() for value in (q_NHA, k_NHA, v_NHV, position_M, offsets)]
    out: Tensor = run(*values, scale)
    return out


@_operator.register_fake
def _fake(
    q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float, kernel: str = registry.AUTO
) -> Tensor:
    return v_NHV.new_empty(v_NHV.shape)


@torch.library.custom_op("ninerank::hstu_attention_backward", mutates_args=())
def _backward_operator(
    grad_NHV: Tensor,
    q_NHA: Tensor,
    k_NHA: Tensor,
    v_NHV: Tensor,
    position_M: Tensor,
    offsets: Tensor,
    scale: float,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = kernel_for(kernel, grad=grad_NHV, q=q_NHA, k=k_NHA, v=v_NHV)
    run = registry.choose("hstu_attention_backward", q_NHA.device.type, name)
    values = [value.contiguous() for value in (grad_NHV, q_NHA, k_NHA, v_NHV, position_M, offsets)]
    of_q, of_k, of_v, of_position = run(*values, scale)
    return of_q, of_k, of_v, of_position


@_backward_operator.register_fake
def _backward_fake(
    grad_NHV: Tensor,
    q_NHA: Tensor,
    k_NHA: Tensor,
    v_NHV: Tensor,
    position_M: Tensor,
    offsets: Tensor,
    scale: float,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (value.new_empty(value.shape) for value in (q_NHA, k_NHA, v_NHV, position_M))
    return first, second, third, fourth


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_operator(grad, *ctx.saved_tensors, ctx.scale, ctx.kernel), None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("hstu_attention", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("hstu_attention", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("hstu_attention", "torch", __name__, "reference"),
    registry.Kernel("hstu_attention_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("hstu_attention_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("hstu_attention_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
