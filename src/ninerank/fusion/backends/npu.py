"""Graphs on Ascend by npugraph_ex, the graph mode of torch_npu: operators are fused, and recorded for one shape each.

torch_npu's own fused operators take the place of what our graphs have of their patterns; docs/npu.md lists them.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, fx

__all__ = ["record"]


def record(module: fx.GraphModule, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """What runs `module` on inputs shaped like `example`, which lie on the device."""
    import_module("torch_npu")  # it makes npugraph_ex importable
    npugraph_ex: Any = import_module("npugraph_ex")
    backend = npugraph_ex.get_npu_backend(compiler_config=npugraph_ex.CompilerConfig())
    run = backend(_tupled(module), list(example))

    def call(*inputs: Tensor) -> Tensor:
        (out,) = run(*inputs)
        recorded: Tensor = out
        return recorded

    return call


def _tupled(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with a tuple of one as its result, as torch's compilers take it."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output((result,))
    return fx.GraphModule(module, graph, "Tupled").eval()
