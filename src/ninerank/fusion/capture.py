"""From a module over named tensors to a graph of operators whose inputs know their role and their sizes.

    capture(SidedTower(...), [GraphInput("deep.request", "request", ("U", 20, 16)), ...]) -> fx.GraphModule

The graph has one placeholder an input, in their order, with the `GraphInput` as `meta["input"]`; weights are buffers under the names
that the module gives them. Sizes that are names stand for any size, the same wherever the name is the same.
"""

import keyword
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ninerank.errors import BundleError
from ninerank.fusion.roles import Role

__all__ = ["REQUESTS", "ROWS", "GraphInput", "add_weight", "capture", "examples_of", "inputs_of", "weight_of"]

REQUESTS, ROWS = "U", "B"
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class GraphInput:
    """One input tensor. dims: sizes, or names of sizes that differ from call to call: "U" requests, "B" rows, others lengths."""

    name: str
    role: Role
    dims: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape where named sizes have these values."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


class _Positional(nn.Module):
    """A module that takes its inputs one by one, in the order of `names`."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs: Tensor = self.module(dict(zip(self.names, inputs, strict=True)))
        return outputs


def capture(module: nn.Module, inputs: Sequence[GraphInput]) -> fx.GraphModule:
    """The graph of `module` in eval mode. module: takes a mapping of tensors, returns one.

    Raises BundleError for a module that torch.export cannot take, or whose graph changes its own state.
    """
    names = tuple(given.name for given in inputs)
    examples, dynamic = examples_of(inputs)
    positional = _Positional(module, names).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns of its own internals
            program = torch.export.export(positional, examples, dynamic_shapes=(dynamic,), strict=False)
            if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in program.graph.nodes):
                program = program.run_decompositions({})  # decomposes nothing, but turns what writes in place into what does not
    except Exception as error:
        inner = getattr(module, "tower", module)
        raise BundleError(f"torch.export cannot take tower {type(inner).__name__}: {str(error).strip().splitlines()[0]}") from error
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise BundleError(f"the graph changes its own state ({sorted(signature.buffers_to_mutate.values())}); a served graph must not")
    return _module(program, inputs)


def inputs_of(module: fx.GraphModule) -> list[GraphInput]:
    """The inputs of a captured graph, in calling order."""
    return [node.meta["input"] for node in module.graph.find_nodes(op="placeholder")]


def add_weight(module: nn.Module, name: str, tensor: Tensor) -> str:
    """Store a weight under a dotted name, made one that Python can read and unique where it is taken; returns the name."""
    name = ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in name.split("."))
    unique, number = name, 1
    while _is_taken(module, unique):
        unique, number = f"{name}_{number}", number + 1
    *path, last = unique.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    module.register_buffer(last, tensor)
    return unique


def weight_of(module: nn.Module, name: str) -> Tensor:
    """The weight under a dotted name; raises BundleError for what is no tensor."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise BundleError(f"the graph reads {name}, which is {type(value).__name__} and no tensor")
    return value


def _is_taken(module: nn.Module, name: str) -> bool:
    """Whether something has this name, or a weight has a leading part of it."""
    value: Any = module
    for part in name.split("."):
        if isinstance(value, Tensor) or not hasattr(value, part):
            return isinstance(value, Tensor)
        value = getattr(value, part)
    return True


def examples_of(
    inputs: Sequence[GraphInput], *, fixed: Mapping[str, int] | None = None
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Tensors to trace with, and which of their sizes may be any; named sizes in `fixed` are what is given there.

    No other size is 0 or 1 or a factor of another, so that the exporter takes none of them for a constant.
    """
    fixed = fixed or {}
    sizes = {REQUESTS: 3, ROWS: 5}
    for name in (dim for given in inputs for dim in given.dims if isinstance(dim, str)):
        sizes.setdefault(name, 7 + len(sizes) - 2)
    dims = {name: torch.export.Dim(f"size_{place}", min=1, max=MAX_SIZE) for place, name in enumerate(sizes)}
    examples = tuple(torch.zeros(given.shape({**sizes, **fixed}), dtype=given.dtype) for given in inputs)
    free = dims.keys() - fixed.keys()
    return examples, tuple({axis: dims[str(dim)] for axis, dim in enumerate(given.dims) if dim in free} for given in inputs)


def _module(program: torch.export.ExportedProgram, inputs: Sequence[GraphInput]) -> fx.GraphModule:
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    given = dict(zip(signature.user_inputs, inputs, strict=True))
    root, graph = nn.Module(), fx.Graph()
    values: dict[fx.Node, Any] = {}
    weights: dict[str, fx.Node] = {}
    for node in _without_checks(program.graph):
        if node.op == "placeholder" and node.name in given:
            values[node] = graph.placeholder(f"input_{len(values)}")
            values[node].meta = {"input": given[node.name]}
        elif node.op == "placeholder":
            name = stored[node.name]
            if node.users and name not in weights:
                tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
                own = add_weight(root, name.removeprefix("module.tower.").removeprefix("module."), _plain(tensor))
                weights[name] = graph.create_node("get_attr", own)
            if name in weights:
                values[node] = weights[name]
        elif node.op == "output":
            outputs: Any = node.args[0]
            graph.output(fx.map_arg(outputs[0], values.__getitem__))
        elif node.op == "call_function":
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = {}
        else:
            raise BundleError(f"the graph has a node {node.op} {node.target}, which a bundle cannot hold")
    graph.lint()
    return fx.GraphModule(root, graph, class_name="SidedGraph").eval()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").clone().contiguous()


def _without_checks(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders first, then all but the exporter's own assertions about metadata."""
    yield from graph.find_nodes(op="placeholder")
    for node in graph.nodes:
        if node.op != "placeholder" and node.target is not torch.ops.aten._assert_tensor_metadata.default:
            yield node
