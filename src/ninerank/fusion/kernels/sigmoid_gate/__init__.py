"""An activation whose slope a sigmoid of the input sets, in one pass: Dice, SiLU and their kin.

    out[n, d] = x[n, d] * (base[d] + slope[d] * sigmoid(shift[d] + scale[d] * x[n, d]))

Dice in evaluation (Zhou et al. 2018, arXiv:1706.06978): scale = 1 / std, shift = -mean / std, base = alpha, slope = 1 - alpha.
x: float32 or bfloat16 (..., D), contiguous. shift, scale, base, slope: float32 (D,). Returns the shape of x, float32 or, if
`bf16_out`, bfloat16; arithmetic is float32. A pass of its own for each of the four steps would move the tensor through memory
four times.
No gradient: served graphs alone use it. Deterministic. Relative error of the sigmoid below 2e-6.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).

N rows, D columns.
"""

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry

__all__ = ["reference", "sigmoid_gate"]


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
    run = registry.choose("sigmoid_gate", x.device.type, kernel)
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


OPERATOR = torch.ops.ninerank.sigmoid_gate.default  # what graphs call

for _kernel in (
    registry.Kernel("sigmoid_gate", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("sigmoid_gate", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("sigmoid_gate", "torch", __name__, "reference"),
):
    registry.register(_kernel)
