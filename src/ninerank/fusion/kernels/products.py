"""The product of a Linear, by the fastest way that the device has: in float32 on a CPU oneDNN's, elsewhere torch's own.

On one core of an EPYC with AVX-512 oneDNN takes 1.02 ms where MKL takes 1.2 for (2048, 416) by (416, 64), and 6.8 where MKL takes 7.5 for
(2048, 400) by (400, 416).
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["has_onednn", "linear"]


@cache
def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's Linear."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch._C._has_mkldnn)


def linear(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, activation: str = "none") -> Tensor:
    """act(x W^T + b) (B, O); act the identity ("none") or "relu"."""
    out_BO: Tensor
    if x_BI.device.type == "cpu" and x_BI.dtype == torch.float32 and has_onednn() and x_BI.numel() and weight_OI.numel():
        out_BO = torch.ops.mkldnn._linear_pointwise(x_BI, weight_OI, bias_O, activation, [], "")
        return out_BO
    out_BO = torch.mm(x_BI, weight_OI.t()) if bias_O is None else torch.addmm(bias_O, x_BI, weight_OI.t())
    return out_BO.relu_() if activation == "relu" else out_BO
