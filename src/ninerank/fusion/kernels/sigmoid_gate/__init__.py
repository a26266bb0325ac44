"""An activation whose slope a sigmoid of the input sets, in one pass: Dice, SiLU and their kin.

    out[n, d] = x[n, d] * (base[d] + slope[d] * sigmoid(shift[d] + scale[d] * x[n, d]))

Dice in evaluation (Zhou et al. 2018, arXiv:1706.06978): scale = 1 / std, shift = -mean / std, base = alpha, slope = 1 - alpha.
x: float32 or bfloat16 (..., D), contiguous. shift, scale, base, slope: float32 (D,). Returns the shape of x, float32 or, if
`bf16_out`, bfloat16; arithmetic is float32. A pass of its own for each of the four steps would move the tensor through memory
four times.
Gradient (x and the result float32, or float64: the reference), by `sigmoid_gate_backward`, with s the sigmoid and t = g x slope s (1 - s):
    dx = g (base + slope s) + t scale;  dshift = sum t;  dscale = sum t x;  dbase = sum g x;  dslope = sum g x s
Deterministic: sums over rows go block by block of rows, in order. Relative error of the sigmoid below 2e-6.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).

N rows, D columns.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.jagged import kernel_for

__all__ = ["backward_reference", "reference", "sigmoid_gate"]


def sigmoid_gate(
    x: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor, bf16_out: bool = False, *, kernel: str = registry.AUTO
) -> Tensor:
    """The gated input; see the module's contract.

    >>> one, zero = torch.ones(2), torch.zeros(2)
    >>> sigmoid_gate(torch.tensor([[0.0, 1.0]]), zero, one, zero, one, kernel="torch")
    tensor([[0.0000, 0.7311]])
    """
    out: Tensor = _operator(x, shift_D, scale_D, base_D, slope_D, bf16_out, kernel)
    return out


def reference(x: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor, bf16_out: bool) -> Tensor:
    """The contract in plain torch operators."""
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    out = wide * (base_D + slope_D * torch.sigmoid(shift_D + scale_D * wide))
    return out.to(torch.bfloat16) if bf16_out else out


@torch.library.custom_op("ninerank::sigmoid_gate", mutates_args=())
def _operator(
    x: Tensor,
    shift_D: Tensor,
    scale_D: Tensor,
    base_D: Tensor,
    slope_D: Tensor,
    bf16_out: bool = False,
    kernel: str = registry.AUTO,
) -> Tensor:
    vectors = {"shift": shift_D, "scale": scale_D, "base": base_D, "slope": slope_D}
    if x.dim() < 1 or not x.is_contiguous() or x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, strides {x.stride()}; contiguous float32 or bfloat16 of (..., D) is needed")
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}; {tuple(x.shape[-1:])} is needed, one number a column")
    name = "torch" if x.dtype == torch.float64 and kernel == registry.AUTO else kernel
    run = registry.choose("sigmoid_gate", x.device.type, name)
    out: Tensor = run(x, shift_D, scale_D, base_D, slope_D, bf16_out)
    return out


@_operator.register_fake
def _fake(
    x: Tensor,
    shift_D: Tensor,
    scale_D: Tensor,
    base_D: Tensor,
    slope_D: Tensor,
    bf16_out: bool = False,
    kernel: str = registry.AUTO,
) -> Tensor:
    dtype = torch.bfloat16 if bf16_out else x.dtype if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x, dtype=dtype)


def backward_reference(
    grad_ND: Tensor, x_ND: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, D), and of shift, scale, base and slope (4, D), in plain torch operators."""
    gate_ND = torch.sigmoid(shift_D + scale_D * x_ND)
    of_gate_ND = grad_ND * x_ND
    of_inner_ND = of_gate_ND * slope_D * gate_ND * (1 - gate_ND)
    sums_4D = torch.stack([of_inner_ND.sum(0), (of_inner_ND * x_ND).sum(0), of_gate_ND.sum(0), (of_gate_ND * gate_ND).sum(0)])
    return grad_ND * (base_D + slope_D * gate_ND) + of_inner_ND * scale_D, sums_4D


@torch.library.custom_op("ninerank::sigmoid_gate_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, x: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    name = kernel_for(kernel, grad=grad, x=x, shift=shift_D, scale=scale_D, base=base_D, slope=slope_D)
    run = registry.choose("sigmoid_gate_backward", x.device.type, name)
    dim = x.shape[-1]
    vectors = (vector.contiguous() for vector in (shift_D, scale_D, base_D, slope_D))
    x_grad_ND, sums_4D = run(grad.reshape(-1, dim).contiguous(), x.reshape(-1, dim), *vectors)
    return x_grad_ND.view(x.shape), sums_4D


@_backward_operator.register_fake
def _backward_fake(
    grad: Tensor, x: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((4, x.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *values, _, ctx.kernel = inputs
    ctx.save_for_backward(*values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_grad, sums_4D = _backward_operator(grad, *ctx.saved_tensors, ctx.kernel)
    return x_grad, *sums_4D.unbind(0), None, None


_operator.register_autograd(_backward, setup_context=_setup_context)

OPERATOR = torch.ops.ninerank.sigmoid_gate.default  # what graphs call

for _kernel in (
    registry.Kernel("sigmoid_gate", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("sigmoid_gate", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("sigmoid_gate", "torch", __name__, "reference"),
    registry.Kernel("sigmoid_gate_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("sigmoid_gate_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("sigmoid_gate_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
