"""Attention over histories of any length without padding: the weighted sum of each history's keys.

    out[b, :] = sum over positions n of history b of w_n * k_n
    w_n = s_n, or with `softmax` exp(s_n) / sum over the history of exp(s)

score_N: (N,) what an attention unit made of [q, k, q * k] (`jagged_pairs`). key_ND: (N, D), history after history. offsets: int32 or
int64 (B + 1,), from 0 to N (checked on CPU). Returns (B, D), zeros for an empty history. float32 (float64: the reference).

Gradient, by `jagged_attention_backward`, with d_n = <g_b, k_n>:  dk_n = w_n g_b;  ds_n = d_n, or with `softmax`
w_n (d_n - sum over the history of w d). The weights are made anew from the scores, so that nothing is kept but the inputs.
Deterministic: a history is summed in the order of n by one thread, and every output is written once.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: Zhou et al., Deep Interest Network, KDD 2018, equation 3; jagged tensors as in TorchRec.

B histories, N positions, D embedding dim.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.jagged import check_offsets, history_of, kernel_for

__all__ = ["backward_reference", "jagged_attention", "reference"]


def jagged_attention(score_N: Tensor, key_ND: Tensor, offsets: Tensor, *, softmax: bool = False, kernel: str = registry.AUTO) -> Tensor:
    """Weighted sums (B, D); see the module's contract.

    >>> score, key = torch.tensor([2.0, 3.0, 1.0]), torch.tensor([[1.0], [10.0], [100.0]])
    >>> jagged_attention(score, key, torch.tensor([0, 2, 2, 3]), kernel="torch").squeeze(1)
    tensor([ 32.,   0., 100.])
    """
    out: Tensor = _operator(score_N, key_ND, offsets, softmax, kernel)
    return out


def weights(score_N: Tensor, history_N: Tensor, num_histories: int, softmax: bool) -> Tensor:
    """w (N,) in plain torch operators."""
    if not softmax:
        return score_N
    greatest_B = score_N.new_full((num_histories,), float("-inf")).scatter_reduce(0, history_N, score_N, "amax")
    each_N = (score_N - greatest_B[history_N]).exp()
    return each_N / torch.zeros_like(greatest_B).index_add(0, history_N, each_N)[history_N]


def reference(score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool) -> Tensor:
    """The contract in plain torch operators."""
    num_histories = offsets.shape[0] - 1
    history_N = history_of(offsets, key_ND.shape[0]).to(torch.int64)
    weight_N = weights(score_N, history_N, num_histories, softmax)
    return key_ND.new_zeros(num_histories, key_ND.shape[1]).index_add_(0, history_N, weight_N[:, None] * key_ND)


def backward_reference(grad_BD: Tensor, score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Gradients of score (N,) and key (N, D) in plain torch operators."""
    num_histories = grad_BD.shape[0]
    history_N = history_of(offsets, key_ND.shape[0]).to(torch.int64)
    weight_N = weights(score_N, history_N, num_histories, softmax)
    grad_ND = grad_BD.index_select(0, history_N)
    score_grad_N = (grad_ND * key_ND).sum(1)
    if softmax:
        mean_B = score_N.new_zeros(num_histories).index_add_(0, history_N, weight_N * score_grad_N)
        score_grad_N = weight_N * (score_grad_N - mean_B[history_N])
    return score_grad_N, weight_N[:, None] * grad_ND


@torch.library.custom_op("ninerank::jagged_attention", mutates_args=())
def _operator(score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool, kernel: str = registry.AUTO) -> Tensor:
    _check(score_N, key_ND, offsets, offsets.shape[0] - 1)
    run = registry.choose("jagged_attention", key_ND.device.type, kernel_for(kernel, score=score_N, key=key_ND))
    out: Tensor = run(score_N.contiguous(), key_ND.contiguous(), offsets.contiguous(), softmax)
    return out


@_operator.register_fake
def _fake(score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool, kernel: str = registry.AUTO) -> Tensor:
    return key_ND.new_empty((offsets.shape[0] - 1, key_ND.shape[1]))


@torch.library.custom_op("ninerank::jagged_attention_backward", mutates_args=())
def _backward_operator(
    grad_BD: Tensor, score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    _check(score_N, key_ND, offsets, grad_BD.shape[0])
    if grad_BD.shape[1:] != key_ND.shape[1:] or grad_BD.dtype != key_ND.dtype:
        raise ValueError(f"the gradient is {grad_BD.dtype} {tuple(grad_BD.shape)}, the keys are {key_ND.dtype} {tuple(key_ND.shape)}")
    run = registry.choose("jagged_attention_backward", key_ND.device.type, kernel_for(kernel, score=score_N, key=key_ND))
    score_grad_N, key_grad_ND = run(grad_BD.contiguous(), score_N.contiguous(), key_ND.contiguous(), offsets.contiguous(), softmax)
    return score_grad_N, key_grad_ND


@_backward_operator.register_fake
def _backward_fake(
    grad_BD: Tensor, score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    return score_N.new_empty(score_N.shape), key_ND.new_empty(key_ND.shape)


def _check(score_N: Tensor, key_ND: Tensor, offsets: Tensor, num_histories: int) -> None:
    if key_ND.dim() != 2 or score_N.shape != key_ND.shape[:1]:
        raise ValueError(f"scores are {tuple(score_N.shape)}, keys {tuple(key_ND.shape)}; (N,) and (N, D) are needed")
    check_offsets(offsets, num_histories, key_ND.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    score_N, key_ND, offsets, ctx.softmax, ctx.kernel = inputs
    ctx.save_for_backward(score_N, key_ND, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    score_grad_N, key_grad_ND = _backward_operator(grad, *ctx.saved_tensors, ctx.softmax, ctx.kernel)
    return score_grad_N, key_grad_ND, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("jagged_attention", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("jagged_attention", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("jagged_attention", "torch", __name__, "reference"),
    registry.Kernel("jagged_attention_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("jagged_attention_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("jagged_attention_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
