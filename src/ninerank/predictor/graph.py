"""The dense graph of a bundle: what torch.export captures, kept as plain JSON and safetensors.

torch.export's own archive holds pickled sample inputs, may hold pickled weights, and its expressions are evaluated as
Python when it is loaded. A bundle may come from anywhere, so its graph is kept in a form of our own that can express
tensors, numbers and operators of two namespaces, and nothing else. It is also smaller, and free of the exporter's paths.

    {"format": 2, "inputs": [{"name": "dense.item", "role": "item", "dims": ["B", 4], "dtype": "float32"}],
     "nodes": [{"name": "linear", "op": "aten.linear.default", "args": [{"input": "dense.item"}, {"weight": "mlp.weight"}], "kwargs": {}}],
     "output": {"ref": "linear"}}

Inputs are those of `EmbeddingCollection.sides`, with the role and the sizes that the compiler (`fusion`) works from.
"""

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from ninerank.errors import BundleError
from ninerank.fusion.capture import GraphInput, add_weight, capture, inputs_of, weight_of
from ninerank.fusion.roles import Role

__all__ = ["DenseGraph", "build_graph", "describe_graph", "export_graph"]

FORMAT = 2
MAX_SIZE = 2**31
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_WEIGHT = re.compile(r"[A-Za-z0-9_]{1,200}(\.[A-Za-z0-9_]{1,200}){0,50}")
_NAMESPACES = ("aten", "ninerank")
_BUILTINS: dict[str, Any] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "getitem")
    },
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not")},
}
_BUILTIN_NAMES = {function: name for name, function in _BUILTINS.items()}
# What an argument may be besides numbers, strings, lists and nodes, by the name it is written under.
_TORCH_TYPES: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


@dataclass(frozen=True)
class DenseGraph:
    """A graph as data. weights: by qualified name, those that the graph reads and perhaps others."""

    text: str
    weights: dict[str, Tensor]


def export_graph(module: nn.Module, inputs: Sequence[GraphInput]) -> DenseGraph:
    """Capture `module`, which takes a mapping of tensors, for any number of requests and rows and any sequence length.

    Raises BundleError for a module that torch.export cannot take, or that uses operators a bundle cannot hold.
    """
    return describe_graph(capture(module, inputs))


def describe_graph(module: fx.GraphModule) -> DenseGraph:
    """A captured graph, changed by passes or not, as data; raises BundleError for what a bundle cannot hold."""
    nodes: list[dict[str, Any]] = []
    weights: dict[str, Tensor] = {}
    references: dict[str, dict[str, str]] = {}
    output: Any = None
    for node in module.graph.nodes:
        if node.op == "placeholder":
            references[node.name] = {"input": node.meta["input"].name}
        elif node.op == "get_attr":
            name = str(node.target)
            references[node.name] = {"weight": name}
            weights[name] = weight_of(module, name).detach().to("cpu").contiguous()
        elif node.op == "call_function":
            references[node.name] = {"ref": node.name}
            nodes.append(
                {
                    "name": node.name,
                    "op": _operator_name(node.target),
                    "args": [_describe_argument(a, references) for a in node.args],
                    "kwargs": {key: _describe_argument(a, references) for key, a in node.kwargs.items()},
                }
            )
        elif node.op == "output":
            output = _describe_argument(node.args[0], references)
        else:
            raise BundleError(f"the graph has a node {node.op} {node.target}, which a bundle cannot hold")
    inputs = [_describe_input(given) for given in inputs_of(module)]
    text = json.dumps({"format": FORMAT, "inputs": inputs, "nodes": nodes, "output": output}, indent=1, allow_nan=False)
    return DenseGraph(text, weights)


def _describe_input(given: GraphInput) -> dict[str, Any]:
    return {"name": given.name, "role": given.role, "dims": list(given.dims), "dtype": str(given.dtype).removeprefix("torch.")}


def _operator_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and _is_allowed(target):
        return str(target)
    if target in _BUILTIN_NAMES:
        return _BUILTIN_NAMES[target]
    raise BundleError(f"the graph uses {target}, which a bundle cannot hold; allowed: pure operators of {' and '.join(_NAMESPACES)}")


def _is_allowed(operator: torch._ops.OpOverload) -> bool:
    """Pure operators of our namespaces; `from_file` is pure by its schema alone."""
    return operator.namespace in _NAMESPACES and not operator._schema.is_mutable and operator._schema.name != "aten::from_file"


def _describe_argument(value: Any, references: Mapping[str, dict[str, str]]) -> Any:
    if isinstance(value, fx.Node):
        return references[value.name]
    if isinstance(value, (list, tuple)):
        return [_describe_argument(item, references) for item in value]
    if isinstance(value, torch.device):
        return {"device": "served"}
    for name, kind in _TORCH_TYPES.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise BundleError(f"the graph holds a constant {value!r} of type {type(value).__name__}, which a bundle cannot hold")


def build_graph(graph: DenseGraph, device: torch.device) -> fx.GraphModule:
    """Module that takes the graph's inputs one by one, in the order of `inputs_of`, and returns logits_BT.

    Raises BundleError for text that is not such a graph: unknown operators, operators that write in place or read
    files, names that are not names, missing weights.
    """
    try:
        return _Builder(graph, device).build()
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise BundleError(f"dense graph is malformed: {type(error).__name__}: {error}") from error


class _Builder:
    def __init__(self, graph: DenseGraph, device: torch.device) -> None:
        self.data = json.loads(graph.text)
        if self.data.get("format") != FORMAT:
            raise BundleError(f"dense graph has format {self.data.get('format')!r}, this version reads {FORMAT}")
        self.device = device
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[tuple[str, str], fx.Node] = {}
        self.weights = graph.weights

    def build(self) -> fx.GraphModule:
        for position, described in enumerate(self.data["inputs"]):
            given = _input(described)
            made = self.graph.placeholder(f"input_{position}")
            made.meta["input"] = given
            self.values["input", given.name] = made
        for node in self.data["nodes"]:
            for name in (node["name"], *node["kwargs"]):
                if not _NAME.fullmatch(name):
                    raise BundleError(f"dense graph: {name!r} is no name of a node or an argument")
            args = tuple(self.argument(a) for a in node["args"])
            kwargs = {key: self.argument(a) for key, a in node["kwargs"].items()}
            made = self.graph.create_node("call_function", _operator(node["op"]), args, kwargs, name=node["name"])
            self.values["ref", node["name"]] = made
        self.graph.output(self.argument(self.data["output"]))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name="DenseGraph").eval()

    def argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, name),) = value.items()
        if kind == "weight":
            return self.weight(name)
        if kind in {"ref", "input"}:
            return self.values[kind, name]
        if kind == "device":
            return self.device
        if kind == "float":
            return float(name)
        found = getattr(torch, name)
        if not isinstance(found, _TORCH_TYPES[kind]):
            raise BundleError(f"dense graph: {name!r} is no {kind}")
        return found

    def weight(self, name: str) -> fx.Node:
        if ("weight", name) not in self.values:
            if not _WEIGHT.fullmatch(name):
                raise BundleError(f"dense graph: {name!r} is no name of a weight")
            own = add_weight(self.root, name, self.weights[name].to(self.device))
            self.values["weight", name] = self.graph.create_node("get_attr", own)
        return self.values["weight", name]


def _input(described: Any) -> GraphInput:
    name, role, dims, dtype = (described[key] for key in ("name", "role", "dims", "dtype"))
    is_sound = isinstance(name, str) and role in get_args(Role) and all(isinstance(dim, str) or 0 <= dim < MAX_SIZE for dim in dims)
    found = getattr(torch, dtype)
    if not is_sound or not isinstance(found, torch.dtype):
        raise BundleError(f"dense graph: {described!r:.200} is no input")
    return GraphInput(name, role, tuple(dims), found)


def _operator(name: str) -> Any:
    if name in _BUILTINS:
        return _BUILTINS[name]
    namespace, _, rest = name.partition(".")
    packet_name, _, overload = rest.partition(".")
    if namespace in _NAMESPACES and _NAME.fullmatch(packet_name) and _NAME.fullmatch(overload):
        found = getattr(getattr(getattr(torch.ops, namespace), packet_name, None), overload, None)
        if isinstance(found, torch._ops.OpOverload) and _is_allowed(found):
            return found
    raise BundleError(f"dense graph: operator {name!r} is unknown here or not allowed in a bundle")
