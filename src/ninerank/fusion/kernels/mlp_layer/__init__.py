"""A layer of an MLP with what follows it: bias, activation and, where there is one, a mask of the row's own.

    out = act(x W^T + b) * m          act the identity or max(., 0); m (B, O) weights of each row, or none

x_BI: (B, I). weight_OI, bias_O: of the layer. mask_BO: (B, O) or None, as MaskNet's instance-guided mask takes it. Returns (B, O), and
a = act(x W^T + b), which the backward pass takes and which carries no gradient of its own (empty without a mask, where it is the result).
float32 (float64: the reference). The products are the device's own; around them each number is read and written once. On the CPU the
product is oneDNN's, which adds the bias and cuts at 0 while a tile of the result is in registers.

Gradient, by `mlp_layer_backward`:  gz = g * m * act'(a);  gm = g * a;  gb = sum of gz;  gW = gz^T x;  gx = gz W.
Deterministic: sums over rows go block by block of rows in order.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Pays: on the CPU (`pays`), where torch's Linear and ReLU go over the result three times, and their gradients twice more. On CUDA cuBLAS adds
the bias itself, so that as many kernels are launched either way; with a mask it is one less forward and two less backward.
Prior work: Liger-Kernel's fused layers; Wang et al., MaskNet, DLP-KDD 2021, equations 3 to 5.

B rows, I width of the input, O of the output.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import products, registry
from ninerank.fusion.kernels.jagged import kernel_for

__all__ = ["ACTIVATIONS", "backward_reference", "combine_reference", "mlp_layer", "pays"]

ACTIVATIONS = ("none", "relu")


def mlp_layer(
    x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, activation: str, mask_BO: Tensor | None = None, *, kernel: str = registry.AUTO
) -> Tensor:
    """act(x W^T + b) * m (B, O); see the module's contract.

    >>> x, weight, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[3.0, 5.0]])
    >>> mlp_layer(x, weight, torch.tensor([1.0, 0.0]), "relu", mask, kernel="torch")
    tensor([[12., 0.]])
    """
    out: Tensor = _operator(x_BI, weight_OI, bias_O, activation, mask_BO, kernel)[0]
    return out


def pays(x_BI: Tensor) -> bool:
    """Whether the operator without a mask is faster than the layer and its activation by themselves."""
    return x_BI.device.type == "cpu"


def combine_reference(
    x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, activation: str, mask_BO: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """a, and a * m where there is a mask, in plain torch operators."""
    a_BO = torch.addmm(bias_O, x_BI, weight_OI.t())
    if activation == "relu":
        a_BO = a_BO.relu_()
    return a_BO, None if mask_BO is None else a_BO * mask_BO


def backward_reference(grad_BO: Tensor, a_BO: Tensor, activation: str, mask_BO: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """gz (B, O), gb (O,) and gm (B, O), in plain torch operators."""
    of_a_BO = grad_BO if mask_BO is None else grad_BO * mask_BO
    of_z_BO = torch.where(a_BO > 0, of_a_BO, 0.0) if activation == "relu" else of_a_BO.clone()
    return of_z_BO, of_z_BO.sum(0), None if mask_BO is None else grad_BO * a_BO


@torch.library.custom_op("ninerank::mlp_layer", mutates_args=())
def _operator(
    x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, activation: str, mask_BO: Tensor | None = None, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    mask = {} if mask_BO is None else {"mask": mask_BO}
    is_mask = mask_BO is None or mask_BO.shape == (x_BI.shape[0], weight_OI.shape[0])
    if x_BI.dim() != 2 or weight_OI.shape[1:] != x_BI.shape[1:] or bias_O.shape != weight_OI.shape[:1] or not is_mask:
        shapes = ", ".join(str(tuple(value.shape)) for value in (x_BI, weight_OI, bias_O, *mask.values()))
        raise ValueError(f"shapes {shapes}; (B, I), (O, I), (O,) and, if at all, (B, O) are needed")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; one of {', '.join(ACTIVATIONS)} is needed")
    name = kernel_for(kernel, x=x_BI, weight=weight_OI, bias=bias_O, **mask)
    combine = registry.choose("mlp_layer", x_BI.device.type, name)
    with torch.autocast(x_BI.device.type, enabled=False):
        a_BO, out_BO = combine(x_BI, weight_OI, bias_O, activation, None if mask_BO is None else mask_BO.contiguous())
    return (a_BO, a_BO.new_empty(0)) if out_BO is None else (out_BO, a_BO)


@_operator.register_fake
def _fake(
    x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, activation: str, mask_BO: Tensor | None = None, kernel: str = registry.AUTO
) -> tuple[Tensor, Tensor]:
    shape = (x_BI.shape[0], weight_OI.shape[0])
    return x_BI.new_empty(shape), x_BI.new_empty(0 if mask_BO is None else shape)


@torch.library.custom_op("ninerank::mlp_layer_backward", mutates_args=())
def _backward_operator(
    grad_BO: Tensor,
    x_BI: Tensor,
    weight_OI: Tensor,
    a_BO: Tensor,
    activation: str,
    needs_x: bool,
    mask_BO: Tensor | None = None,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = kernel_for(kernel, grad=grad_BO, x=x_BI, weight=weight_OI, a=a_BO)
    back = registry.choose("mlp_layer_backward", x_BI.device.type, name)
    of_z_BO, of_bias_O, of_mask_BO = back(grad_BO.contiguous(), a_BO, activation, None if mask_BO is None else mask_BO.contiguous())
    with torch.autocast(x_BI.device.type, enabled=False):
        of_weight_OI = torch.mm(of_z_BO.t(), x_BI)
        of_x_BI = products.linear(of_z_BO, weight_OI.t()) if needs_x else x_BI.new_empty(0)
    return of_x_BI, of_weight_OI, of_bias_O, x_BI.new_empty(0) if of_mask_BO is None else of_mask_BO


@_backward_operator.register_fake
def _backward_fake(
    grad_BO: Tensor,
    x_BI: Tensor,
    weight_OI: Tensor,
    a_BO: Tensor,
    activation: str,
    needs_x: bool,
    mask_BO: Tensor | None = None,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_x_BI = x_BI.new_empty(x_BI.shape if needs_x else 0)
    return (
        of_x_BI,
        weight_OI.new_empty(weight_OI.shape),
        weight_OI.new_empty(len(weight_OI)),
        a_BO.new_empty(0 if mask_BO is None else a_BO.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BI, weight_OI, _, ctx.activation, mask_BO, ctx.kernel = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_BI, weight_OI, output[0] if mask_BO is None else output[1], mask_BO)


def _backward(ctx: Any, grad_BO: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_BO is None:
        return (None,) * 6
    x_BI, weight_OI, a_BO, mask_BO = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    of_x_BI, of_weight_OI, of_bias_O, of_mask_BO = _backward_operator(
        grad_BO, x_BI, weight_OI, a_BO, ctx.activation, needs_x, mask_BO, ctx.kernel
    )
    return of_x_BI if needs_x else None, of_weight_OI, of_bias_O, None, None if mask_BO is None else of_mask_BO, None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("mlp_layer", "numba", f"{__name__}.cpu", "combine", ("cpu",), "numba"),
    registry.Kernel("mlp_layer", "triton", f"{__name__}.triton", "combine", ("cuda", "npu"), "triton"),
    registry.Kernel("mlp_layer", "torch", __name__, "combine_reference"),
    registry.Kernel("mlp_layer_backward", "numba", f"{__name__}.cpu", "backward", ("cpu",), "numba"),
    registry.Kernel("mlp_layer_backward", "triton", f"{__name__}.triton", "backward", ("cuda", "npu"), "triton"),
    registry.Kernel("mlp_layer_backward", "torch", __name__, "backward_reference"),
):
    registry.register(_kernel)
