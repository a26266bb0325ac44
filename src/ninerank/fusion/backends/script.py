"""FX graphs as TorchScript source: executed without Python, so that threads that score do not wait for each other.

torch.export leaves a graph of aten operators; run node by node from Python it holds the interpreter's lock between operators. Here
each node becomes one line of a TorchScript function, whose interpreter is C++. The text is made from operator names and numbers of
the graph alone, never from a file's strings.

    def forward(input_0: Tensor, weight_0: Tensor):
        linear = torch.ops.aten.linear(input_0, weight_0, None)
        return linear
"""

import keyword
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.jit._fuser import optimized_execution

from ninerank.errors import BundleError
from ninerank.fusion.capture import weight_of

__all__ = ["ScriptRunner", "script"]

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_CALLS = {torch.sym_max: "max", torch.sym_min: "min", torch.sym_int: "int", torch.sym_float: "float", torch.sym_not: "not ", min: "min"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ScriptRunner:
    """A compiled graph: call it with the graph's inputs, in the order of its placeholders; from any number of threads at once."""

    def __init__(self, function: Callable[..., Any], weights: Sequence[Tensor], source: str) -> None:
        self._function, self._weights = function, tuple(weights)
        self.source = source

    def __call__(self, *inputs: Tensor) -> Tensor:
        with optimized_execution(False):  # its profiles and rewrites are per shape, and cost the first calls of each
            out: Tensor = self._function(*inputs, *self._weights)
        return out


def script(module: fx.GraphModule) -> ScriptRunner:
    """Compile a graph of operators, sizes and weights; raises BundleError for a node that TorchScript cannot express."""
    names: dict[fx.Node, str] = {}
    inputs: list[str] = []
    weights: dict[str, Tensor] = {}
    lines: list[str] = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"input_{len(inputs)}"
            inputs.append(names[node])
        elif node.op == "get_attr":
            names[node] = f"weight_{len(weights)}"
            weights[names[node]] = weight_of(module, node.target).detach()
        elif node.op == "call_function":
            names[node] = f"{_plain(node.name)}_"
            lines.append(f"    {names[node]} = {_expression(node, names)}")
        elif node.op == "call_method" and node.target == "size":
            names[node] = f"{_plain(node.name)}_"
            lines.append(f"    {names[node]} = {names[node.args[0]]}.size({_argument(node.args[1], names)})")
        elif node.op == "output":
            lines.append(f"    return {_argument(node.args[0], names)}")
        else:
            raise BundleError(f"the graph has a node {node.op} {node.target}, which TorchScript cannot run")
    arguments = ", ".join(f"{name}: Tensor" for name in (*inputs, *weights))
    source = "\n".join([f"def forward({arguments}):", *lines, ""])
    try:
        unit = torch.jit.CompilationUnit(source)
    except RuntimeError as error:
        raise BundleError(f"TorchScript cannot compile the graph: {str(error).strip().splitlines()[0]}") from None
    return ScriptRunner(unit.forward, list(weights.values()), source)


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise BundleError(f"{name!r} is no name of a node")
    return name


def _expression(node: fx.Node, names: dict[fx.Node, str]) -> str:
    target, arguments = node.target, [_argument(a, names) for a in node.args]
    arguments += [f"{_plain(key)}={_argument(value, names)}" for key, value in node.kwargs.items()]
    if target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    if target is operator.neg:
        return f"-{arguments[0]}"
    if target in _INFIX:
        return f"{arguments[0]} {_INFIX[target]} {arguments[1]}"
    if target in _CALLS:
        return f"{_CALLS[target]}({', '.join(arguments)})"
    if target is torch.ops.aten.sym_size.int:
        return f"{arguments[0]}.size({arguments[1]})"
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"torch.ops.{_plain(namespace)}.{_plain(name)}({', '.join(arguments)})"
    raise BundleError(f"the graph calls {target}, which TorchScript cannot run")


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_argument(item, names) for item in value)
        return f"({inner},)" if isinstance(value, tuple) and not value else f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str):
        return _quoted(value)
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    raise BundleError(f"the graph holds a constant {value!r} of type {type(value).__name__}, which TorchScript cannot take")


def _quoted(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]*", text):
        raise BundleError(f"the graph holds a string {text!r}; letters, digits and '_' alone are taken")
    return f'"{text}"'
