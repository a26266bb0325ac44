"""When blocks train through the fused operators of `fusion.kernels`."""

import torch
from torch import Tensor, nn

__all__ = ["takes_operator"]


def takes_operator(module: nn.Module, x: Tensor) -> bool:
    """Whether a block trains through its fused operator: in full precision. What is exported is plain torch, which passes can read."""
    return module.training and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
