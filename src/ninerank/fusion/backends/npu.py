"""Graphs on Ascend by npugraph_ex, the graph mode of torch_npu: operators are fused, and recorded for one shape each.

One of torch_npu's own fused operators has its pattern in our graphs, the attention of fields over each other (AutoInt):

    softmax(q k^T) v over heads      becomes      npu_fusion_attention(q, k, v), which never writes the weights to memory
"""

import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx

from ninerank.fusion.backends.copies import own_copy
from ninerank.fusion.backends.gates import fuse_gates

__all__ = ["fuse_attention", "prepare", "record", "tupled"]

aten = torch.ops.aten


def prepare(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with the fused operators of Ninerank and of torch_npu in place of what they do."""
    module = own_copy(module)
    fuse_gates(module)
    import_module("torch_npu")  # its operators exist from here on
    fuse_attention(module, torch.ops.npu.npu_fusion_attention.default)
    return module


def record(module: fx.GraphModule, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """What runs `module` on inputs shaped like `example`, which lie on the device."""
    npugraph_ex: Any = import_module("npugraph_ex")  # torch_npu makes it importable
    backend = npugraph_ex.get_npu_backend(compiler_config=npugraph_ex.CompilerConfig())
    run = backend(tupled(module), list(example))

    def call(*inputs: Tensor) -> Tensor:
        (out,) = run(*inputs)
        recorded: Tensor = out
        return recorded

    return call


def fuse_attention(module: fx.GraphModule, attention: Callable[..., Any]) -> int:
    """Replace attention over heads in place, by an operator with the signature of npu_fusion_attention; returns how often.

    Reads q, k and v as (B, F, N, A) where the graph turns them to (B, N, F, A), which saves these copies too.
    """
    fused = 0
    for node in list(module.graph.nodes):
        parts = _attention(node)
        if parts is not None:
            *tensors, heads = parts
            with module.graph.inserting_before(node):
                made = module.graph.call_function(attention, (*tensors, heads, "BSND"), {"scale": 1.0})
                node.replace_all_uses_with(module.graph.call_function(operator.getitem, (made, 0)))
            fused += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return fused


def _attention(node: fx.Node) -> tuple[Any, Any, Any, int] | None:
    """q, k and v as they were before they were turned, and the number of heads, where `node` turns softmax(q k^T) v back."""
    (weighted,) = _read(node, aten.transpose.int, 1, 2) or (None,)
    softmax, value = _read(weighted, aten.matmul.default) or (None, None)
    (scores,) = _read(softmax, aten.softmax.int, 3) or (None,)
    query, turned = _read(scores, aten.matmul.default) or (None, None)
    (key,) = _read(turned, aten.transpose.int, 2, 3) or (None,)
    sources = [(_read(part, aten.transpose.int, 1, 2) or (None,))[0] for part in (query, key, value)]
    heads = {_heads(source) for source in sources}
    number = heads.pop()
    return (sources[0], sources[1], sources[2], number) if not heads and number is not None else None


def _read(node: Any, target: Any, *numbers: int) -> tuple[Any, ...] | None:
    """Tensors that a node reads which is this operator with these numbers behind them; None for any other."""
    if not isinstance(node, fx.Node) or node.target is not target or node.kwargs:
        return None
    tensors = tuple(argument for argument in node.args if isinstance(argument, fx.Node))
    return tensors if node.args == (*tensors, *numbers) else None


def _heads(node: Any) -> int | None:
    """N where a node is unflatten(x, 2, (N, A))."""
    if not isinstance(node, fx.Node) or node.target is not aten.unflatten.int or len(node.args) != 3 or node.args[1] != 2:
        return None
    sizes: Any = node.args[2]
    return int(sizes[0]) if len(sizes) == 2 and all(isinstance(size, int) for size in sizes) else None


def tupled(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with a tuple of one as its result, as torch's compilers take it."""
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    graph.output((result,))
    return fx.GraphModule(module, graph, "Tupled").eval()
