"""A stack of low-rank cross layers of DCN V2, one operator forward and one backward.

    x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l        l = 0 ... L - 1, elementwise product; the result is x_L

x0_BI: (B, I). down_LRI: V. up_LRI: the transpose of U. bias_LI: b. Returns x_L (B, I), and what the backward pass takes, which carries
no gradient of its own: x_1 ... x_{L-1} (L - 1, B, I), h = V x (L, B, R) and z = U h (L, B, I). float32 (float64: the reference).
The products with V and U are the device's own matrix products; around them each number is read and written once a layer, and what a
layer adds to the gradients of x_0 and x_l is added in place.

Gradient, with g of x_{l+1}:  gz = g * x_0;  gx_0 += g * (z + b);  gb = sum of gz;  gU' = h' gz;  gh = gz U;  gV = gh' x;  g += gh V.
Deterministic: sums over rows go block by block of rows in order, whatever the number of threads that share them out.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: Wang et al., DCN V2, WWW 2021, equations 1 and 2.

B rows, I width, R rank, L layers.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import products, registry
from ninerank.fusion.kernels.jagged import kernel_for

__all__ = ["backward_reference", "combine_reference", "low_rank_cross"]


def low_rank_cross(x0_BI: Tensor, down_LRI: Tensor, up_LRI: Tensor, bias_LI: Tensor, *, kernel: str = registry.AUTO) -> Tensor:
    """x_L (B, I); see the module's contract.

    >>> x, down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    >>> low_rank_cross(x, down, up, torch.tensor([[0.0, 1.0]]), kernel="torch")
    tensor([[4., 4.]])
    """
    out: Tensor = _operator(x0_BI, down_LRI, up_LRI, bias_LI, kernel)[0]
    return out


def combine_reference(x0_BI: Tensor, z_BI: Tensor, bias_I: Tensor, x_BI: Tensor, out_BI: Tensor) -> None:
    """out = x_0 * (z + b) + x in plain torch operators."""
    out_BI.copy_(x0_BI * (z_BI + bias_I) + x_BI)


def backward_reference(grad_BI: Tensor, x0_BI: Tensor, z_BI: Tensor, bias_I: Tensor, x0_grad_BI: Tensor, z_grad_BI: Tensor) -> Tensor:
    """Write gz, add to gx_0 and return gb (I,), in plain torch operators."""
    x0_grad_BI += grad_BI * (z_BI + bias_I)
    torch.mul(grad_BI, x0_BI, out=z_grad_BI)
    return z_grad_BI.sum(0)


@torch.library.custom_op("ninerank::low_rank_cross", mutates_args=())
def _operator(
    x0_BI: Tensor, down_LRI: Tensor, up_LRI: Tensor, bias_LI: Tensor, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_layers, _, width = down_LRI.shape
    if num_layers == 0 or x0_BI.shape[1:] != (width,) or up_LRI.shape != down_LRI.shape or bias_LI.shape != (num_layers, width):
        shapes = ", ".join(str(tuple(value.shape)) for value in (x0_BI, down_LRI, up_LRI, bias_LI))
        raise ValueError(f"shapes {shapes}; (B, I), (L, R, I), (L, R, I) and (L, I) are needed, with a layer at least")
    name = kernel_for(kernel, x0=x0_BI, down=down_LRI, up=up_LRI, bias=bias_LI)
    combine = registry.choose("low_rank_cross", x0_BI.device.type, name)
    x0_BI, bias_LI = x0_BI.contiguous(), bias_LI.contiguous()
    out_BI, between, h_LBR, z_LBI = _results(x0_BI, down_LRI)
    x_BI = x0_BI
    with torch.autocast(x0_BI.device.type, enabled=False):
        for i in range(num_layers):
            h_LBR[i] = products.linear(x_BI, down_LRI[i])
            torch.mm(h_LBR[i], up_LRI[i], out=z_LBI[i])
            next_BI = between[i] if i + 1 < num_layers else out_BI
            combine(x0_BI, z_LBI[i], bias_LI[i], x_BI, next_BI)
            x_BI = next_BI
    return out_BI, between, h_LBR, z_LBI


def _results(x0_BI: Tensor, down_LRI: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for x_L, the x between, h and z."""
    num_layers, rank, width = down_LRI.shape
    num_rows = x0_BI.shape[0]
    shapes = ((num_rows, width), (num_layers - 1, num_rows, width), (num_layers, num_rows, rank), (num_layers, num_rows, width))
    first, second, third, fourth = (x0_BI.new_empty(shape) for shape in shapes)
    return first, second, third, fourth


@_operator.register_fake
def _fake(
    x0_BI: Tensor, down_LRI: Tensor, up_LRI: Tensor, bias_LI: Tensor, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(x0_BI, down_LRI)


@torch.library.custom_op("ninerank::low_rank_cross_backward", mutates_args=())
def _backward_operator(
    grad_BI: Tensor,
    x0_BI: Tensor,
    down_LRI: Tensor,
    up_LRI: Tensor,
    bias_LI: Tensor,
    between: Tensor,
    h_LBR: Tensor,
    z_LBI: Tensor,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    back = registry.choose("low_rank_cross_backward", x0_BI.device.type, kernel_for(kernel, grad=grad_BI, x0=x0_BI, z=z_LBI))
    x0_BI, bias_LI = x0_BI.contiguous(), bias_LI.contiguous()
    x0_grad_BI, z_grad_BI, own_BI = torch.zeros_like(x0_BI), torch.empty_like(x0_BI), grad_BI.contiguous()
    down_grad_LRI, up_grad_LRI, bias_grad_LI = (value.new_empty(value.shape) for value in (down_LRI, up_LRI, bias_LI))
    with torch.autocast(x0_BI.device.type, enabled=False):
        for i in reversed(range(len(down_LRI))):
            bias_grad_LI[i] = back(own_BI, x0_BI, z_LBI[i], bias_LI[i], x0_grad_BI, z_grad_BI)
            up_grad_LRI[i] = products.linear(h_LBR[i].t(), z_grad_BI.t())
            h_grad_BR = products.linear(z_grad_BI, up_LRI[i])
            down_grad_LRI[i] = products.linear(h_grad_BR.t(), (between[i - 1] if i else x0_BI).t())
            # What was handed in is not ours to change; what the layer above left is.
            add = own_BI.addmm_ if i + 1 < len(down_LRI) else own_BI.addmm
            own_BI = add(h_grad_BR, down_LRI[i])
    return x0_grad_BI.add_(own_BI), down_grad_LRI, up_grad_LRI, bias_grad_LI


@_backward_operator.register_fake
def _backward_fake(
    grad_BI: Tensor,
    x0_BI: Tensor,
    down_LRI: Tensor,
    up_LRI: Tensor,
    bias_LI: Tensor,
    between: Tensor,
    h_LBR: Tensor,
    z_LBI: Tensor,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (value.new_empty(value.shape) for value in (x0_BI, down_LRI, up_LRI, bias_LI))
    return first, second, third, fourth


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *values, ctx.kernel = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as z are made for each backward pass
    ctx.save_for_backward(*values, *output[1:])


def _backward(ctx: Any, grad_BI: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_BI is None:
        return (None,) * 5
    return *_backward_operator(grad_BI, *ctx.saved_tensors, ctx.kernel), None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("low_rank_cross", "numba", f"{__name__}.cpu", "combine", ("cpu",), "numba"),
    registry.Kernel("low_rank_cross", "triton", f"{__name__}.triton", "combine", ("cuda", "npu"), "triton"),
    registry.Kernel("low_rank_cross", "torch", __name__, "combine_reference"),
    registry.Kernel("low_rank_cross_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("low_rank_cross_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("low_rank_cross_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
