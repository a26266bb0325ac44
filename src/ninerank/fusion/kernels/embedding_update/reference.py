"""The contract in plain torch operators, in the storage's precision (float64 storages for tests)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ninerank.fusion.kernels.embedding_reduce import reference as reduce_reference

__all__ = ["reference"]


def reference(
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
) -> None:
    rows_U, grad_UD = reduce_reference(grad_GD, rows_N, grad_row_N, scale_N, weight_RD.shape[0])
    rows_U = rows_U.to(torch.int64)
    weight_decay, max_gradient, max_row_norm, *constants = hyper
    dtype = torch.float64 if weight_RD.dtype == torch.float64 else torch.float32
    w_UD, g_UD = weight_RD[rows_U].to(dtype), grad_UD.to(dtype)
    if grad_scale is not None:
        g_UD = g_UD * grad_scale.to(dtype)
    g_UD = g_UD.clamp(-max_gradient, max_gradient)
    norm_U1 = g_UD.norm(dim=1, keepdim=True)
    g_UD = torch.where(norm_U1 > max_row_norm, g_UD * (max_row_norm / norm_U1), g_UD) + weight_decay * w_UD
    lr_U1 = lr_T.to(dtype)[torch.searchsorted(first_row_T, rows_U, right=True) - 1, None]
    own = [tensor[rows_U] for tensor in state]
    new_w_UD, *new_state = _RULES[optimizer](w_UD, g_UD, lr_U1, own, constants)
    weight_RD[rows_U] = new_w_UD.to(weight_RD.dtype)
    for tensor, rows in zip(state, new_state, strict=True):
        tensor[rows_U] = rows.to(tensor.dtype)


def _sgd(w: Tensor, g: Tensor, lr: Tensor, state: list[Tensor], constants: list[float]) -> tuple[Tensor, ...]:
    return (w - lr * g,)


def _adagrad(w: Tensor, g: Tensor, lr: Tensor, state: list[Tensor], constants: list[float]) -> tuple[Tensor, ...]:
    total = state[0] + g * g
    return w - lr * g / (total.sqrt() + constants[0]), total


def _rowwise_adagrad(w: Tensor, g: Tensor, lr: Tensor, state: list[Tensor], constants: list[float]) -> tuple[Tensor, ...]:
    total = state[0] + (g * g).mean(dim=1)
    return w - lr * g / (total.sqrt() + constants[0])[:, None], total


def _adam(w: Tensor, g: Tensor, lr: Tensor, state: list[Tensor], constants: list[float]) -> tuple[Tensor, ...]:
    beta1, beta2, eps = constants
    m, v, step = beta1 * state[0] + (1 - beta1) * g, beta2 * state[1] + (1 - beta2) * g * g, state[2] + 1
    age = step.to(torch.float64)[:, None]
    m_hat, v_hat = m / (1 - beta1**age).to(w.dtype), v / (1 - beta2**age).to(w.dtype)
    return w - lr * m_hat / (v_hat.sqrt() + eps), m, v, step


def _ftrl(w: Tensor, g: Tensor, lr: Tensor, state: list[Tensor], constants: list[float]) -> tuple[Tensor, ...]:
    beta, l1, l2 = constants
    n = state[1] + g * g
    z = state[0] + g - (n.sqrt() - state[1].sqrt()) / lr * w
    shrunk = torch.where(z.abs() > l1, z - z.sign() * l1, 0.0)
    return -shrunk / ((beta + n.sqrt()) / lr + l2), z, n


_RULES: dict[str, Callable[[Tensor, Tensor, Tensor, list[Tensor], list[float]], tuple[Tensor, ...]]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam,
    "ftrl": _ftrl,
}
