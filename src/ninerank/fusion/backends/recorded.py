"""Launches of one shape, recorded once and sent to the device as a whole: CUDA graphs, and NPU graphs, which have the same interface.

A ranking graph is dozens of small kernels, whose launches take longer than they do; a recorded graph is one launch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Recorded"]

GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
WARM_UPS = 2


class Recorded:
    """`run` on inputs of one shape, of which `example` is one; a call copies its inputs to where the recording reads them.

    Calls must come one at a time, as the recording has one set of buffers. Raises RuntimeError where `run` cannot be recorded: it waits
    for the device, or copies to the host.
    """

    def __init__(self, run: Callable[..., Tensor], example: Sequence[Tensor]) -> None:
        device = example[0].device
        module = torch.get_device_module(device)
        self._inputs = [tensor.clone() for tensor in example]
        # What is set up in the first calls must not be part of it, and runs beside the current stream, as the recording will.
        stream = module.Stream(device=device)
        stream.wait_stream(module.current_stream(device))
        with module.stream(stream):
            for _ in range(WARM_UPS):
                run(*self._inputs)
        module.current_stream(device).wait_stream(stream)
        self._graph = getattr(module, GRAPHS[device.type])()
        with module.graph(self._graph):
            self._output = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._output.clone()
