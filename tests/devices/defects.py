"""Defects planted on purpose, each of which the lane must find: a lane that finds nothing might look at nothing."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

__all__ = ["CopiesToTheHost", "MixesDevices", "ReadsAValue", "WithoutAKernel", "oversized_tile", "switched_off"]


class _Planted(nn.Module):
    """A tower whose inputs pass a defect first."""

    spoil: Callable[[Tensor], Tensor]

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        logits_BT: Tensor = self.tower({**inputs, "deep": self.spoil(inputs["deep"])})
        return logits_BT


class CopiesToTheHost(_Planted):
    """Back and forth: right, and slow."""

    def spoil(self, deep_BFD: Tensor) -> Tensor:
        return deep_BFD.cpu().clamp(min=-1.0).to(deep_BFD.device)


class ReadsAValue(_Planted):
    """The host waits for a number."""

    def spoil(self, deep_BFD: Tensor) -> Tensor:
        return deep_BFD / float(deep_BFD.detach().abs().max())


class WithoutAKernel(_Planted):
    """An operator that torch_npu runs on the host, without a word in the code."""

    def spoil(self, deep_BFD: Tensor) -> Tensor:
        lengths = torch.ones(deep_BFD.shape[0], dtype=torch.int64, device=deep_BFD.device)
        return torch.segment_reduce(deep_BFD, "sum", lengths=lengths, unsafe=True)


class MixesDevices(_Planted):
    """A constant that was left on the host."""

    def spoil(self, deep_BFD: Tensor) -> Tensor:
        return torch.where(torch.ones(deep_BFD.shape, dtype=torch.bool), deep_BFD, 0.0)


# The check that finds each, and no other does.
CHECKS = {
    "CopiesToTheHost": ("_check_places",),
    "ReadsAValue": ("_check_places",),
    "WithoutAKernel": ("_check_kernel",),
    "MixesDevices": ("_check_places", "_mixed"),
}


@contextmanager
def switched_off(defect: str) -> Iterator[None]:
    """Nobody looks for the defect: what then goes through shows that the check is what finds it."""
    with ExitStack() as stack:
        for check in CHECKS[defect]:
            stack.enter_context(mock.patch(f"tracing._Watching.{check}", return_value=None))
        yield


@contextmanager
def oversized_tile() -> Iterator[None]:
    """Tiles of 64 KiB of float32 in place of 8."""
    with (
        mock.patch("ninerank.fusion.kernels.launch.TILE_ELEMENTS", 1 << 14),
        mock.patch("ninerank.fusion.kernels.launch.MAX_TILE_ROWS", 1 << 10),
    ):
        yield
