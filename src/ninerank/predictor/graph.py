"""The dense graph of a bundle: what torch.export captures, kept as plain JSON and safetensors.

torch.export's own archive holds pickled sample inputs, may hold pickled weights, and its expressions are evaluated as
Python when it is loaded. A bundle may come from anywhere, so its graph is kept in a form of our own that can express
tensors, numbers and operators of two namespaces, and nothing else. It is also smaller, and free of the exporter's paths.

    {"format": 1, "inputs": ["dense", "deep"],
     "nodes": [{"name": "linear", "op": "aten.linear.default", "args": [{"ref": "dense"}, {"weight": "mlp.0.weight"}], "kwargs": {}}],
     "output": {"ref": "linear"}}
"""

import json
import math
import operator
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ninerank.errors import BundleError

__all__ = ["DenseGraph", "build_graph", "export_graph"]

FORMAT = 1
MAX_DIM = 2**31 - 1
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
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
    """A tower as data. inputs: names of the tower's input tensors, in calling order. weights: by qualified name."""

    text: str
    weights: dict[str, Tensor]

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(json.loads(self.text)["inputs"])


class _Positional(nn.Module):
    """A tower that takes its inputs one by one, in the order of `keys`."""

    def __init__(self, tower: nn.Module, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.tower = tower
        self.keys = keys

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.tower(dict(zip(self.keys, inputs, strict=True)))
        return logits


def export_graph(tower: nn.Module, inputs: Mapping[str, Tensor]) -> DenseGraph:
    """Capture `tower` (in eval mode) for any number of rows and any sequence length.

    inputs: one example; its first dimension is the batch, and the second of `*.seq.*` and `mask.*` is a length.
    Raises BundleError for a tower that torch.export cannot take, or that uses operators a bundle cannot hold.
    """
    keys = tuple(inputs)
    rows = torch.export.Dim("rows", min=1, max=MAX_DIM)
    lengths: dict[str, tuple[int, Any]] = {}
    examples, dynamic = [], []
    for key, tensor in inputs.items():
        shape, dims = [3, *tensor.shape[1:]], {0: rows}
        if ".seq." in key or key.startswith("mask."):
            # The example's length is no factor of anything else, so that the exporter does not take it for a constant.
            name = key.rpartition(".seq.")[2].removeprefix("mask.")
            length = lengths.setdefault(name, (7 + len(lengths), torch.export.Dim(f"length_{len(lengths)}", min=1, max=MAX_DIM)))
            shape[1], dims[1] = length
        examples.append(torch.zeros(shape, dtype=tensor.dtype))
        dynamic.append(dims)
    module = _Positional(tower, keys).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns of its own internals
            program = torch.export.export(module, tuple(examples), dynamic_shapes=(tuple(dynamic),), strict=False)
            if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in program.graph.nodes):
                program = program.run_decompositions({})  # decomposes nothing, but turns what writes in place into what does not
    except Exception as error:
        raise BundleError(f"torch.export cannot take tower {type(tower).__name__}: {str(error).strip().splitlines()[0]}") from error
    return _describe(program, keys)


def _describe(program: torch.export.ExportedProgram, keys: tuple[str, ...]) -> DenseGraph:
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise BundleError(f"the graph changes its own state ({sorted(signature.buffers_to_mutate.values())}); a served graph must not")
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    user_keys = dict(zip(signature.user_inputs, keys, strict=True))
    nodes: list[dict[str, Any]] = []
    weights: dict[str, Tensor] = {}
    references: dict[str, dict[str, str]] = {}
    output: Any = None
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in user_keys:
            references[node.name] = {"input": user_keys[node.name]}
        elif node.op == "placeholder" and node.name in stored:
            name = stored[node.name]
            references[node.name] = {"weight": name.removeprefix("tower.")}
            if node.users:
                tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
                weights[name.removeprefix("tower.")] = tensor.detach().to("cpu").clone().contiguous()
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
            (output,) = (_describe_argument(a, references) for a in node.args[0])
        else:
            raise BundleError(f"the graph has a node {node.op} {node.target}, which a bundle cannot hold")
    text = json.dumps({"format": FORMAT, "inputs": list(keys), "nodes": nodes, "output": output}, indent=1, allow_nan=False)
    return DenseGraph(text, weights)


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
    """Module that takes the graph's inputs one by one and returns logits_BT.

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
        for position, key in enumerate(self.data["inputs"]):
            self.values["input", key] = self.graph.placeholder(f"input_{position}")
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
            attribute = f"weight_{sum(kind == 'weight' for kind, _ in self.values)}"
            self.root.register_buffer(attribute, self.weights[name].to(self.device))
            self.values["weight", name] = self.graph.get_attr(attribute)
        return self.values["weight", name]


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
