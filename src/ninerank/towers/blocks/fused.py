"""When blocks train through the fused operators of `fusion.kernels`."""

import torch
from torch import Tensor, nn

__all__ = ["takes_operator"]


def takes_operator(module: nn.Module, x: Tensor) -> bool:
    """Whether a block trains through its fused operator: in full precision. What is exported is plain torch, which passes can read."""
    is_full = x.dtype in (torch.float32, torch.float64)
    # The meta device, on which shapes alone are traced, has no autocast to ask for.
    return module.training and is_full and (x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type))
