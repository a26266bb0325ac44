"""What a pass needs to change a graph: shapes of all values, weights by node, and calls that know their shape at once.

Shapes are found on torch's meta device at sizes that are large primes, so that a size tells what it is: `editor.rows` is B wherever
it stands in a shape. Nothing is computed but what is asked for.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ninerank.fusion.capture import REQUESTS, ROWS, add_weight, inputs_of, weight_of
from ninerank.fusion.roles import colour, joined_role

__all__ = ["Editor", "is_random", "named_sizes", "size_names"]

_PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079, 10091, 10093, 10099, 10103, 10111, 10133, 10139, 10141, 10151)
MOST_RESULTS = 1 << 14


def size_names(module: fx.GraphModule) -> list[str]:
    """Names of the sizes that differ from call to call: U and B first, then lengths."""
    named = [dim for given in inputs_of(module) for dim in given.dims if isinstance(dim, str)]
    return list(dict.fromkeys([REQUESTS, ROWS, *named]))


def named_sizes(module: fx.GraphModule) -> dict[str, int]:
    """A size of its own for every name, which no product of small sizes equals."""
    names = size_names(module)
    if len(names) > len(_PRIMES):
        return {name: 20011 + 2 * place for place, name in enumerate(names)}
    return dict(zip(names, _PRIMES, strict=False))


_results: dict[Any, Any] = {}


def _result(target: Any, args: Any, kwargs: Any) -> Any:
    """What a call returns, without data. Kept by the forms of its arguments, for the same calls are looked at again and again."""
    key = target, _form(args), _form(list(kwargs.items()))
    found = _results.get(key, _results)
    if found is not _results:
        return found
    if isinstance(kwargs.get("device"), torch.device | str):
        kwargs = {**kwargs, "device": torch.device("meta")}
    with torch.no_grad():
        made = target(*args, **kwargs)
    if len(_results) >= MOST_RESULTS:
        _results.clear()
    _results[key] = made
    return made


def _form(value: Any) -> Any:
    """A value as a key: tensors by shape, strides and type, numbers by value and type."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return type(value), value


def is_random(node: fx.Node) -> bool:
    """Whether a call draws at random."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class Editor:
    """A copy of a graph, to be changed. sizes: values of named sizes, for cost; by default primes.

    Every node's `meta` holds "val" (a tensor without data, or a number for sizes) and "role".
    """

    def __init__(self, module: fx.GraphModule, sizes: Mapping[str, int] | None = None) -> None:
        self.module = nn.Module()
        self.graph = copy.deepcopy(module.graph)
        for name in dict.fromkeys(str(node.target) for node in self.graph.find_nodes(op="get_attr")):
            kept = add_weight(self.module, name, weight_of(module, name))
            assert kept == name, f"{name} is no name of a weight"
        self.sizes = named_sizes(module) if sizes is None else dict(sizes)
        self.requests, self.rows = self.sizes[REQUESTS], self.sizes[ROWS]
        colour(self.graph)
        for node in self.graph.nodes:
            self._fill(node)

    def _fill(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            given = node.meta["input"]
            node.meta["val"] = torch.empty(given.shape(self.sizes), dtype=given.dtype, device="meta")
        elif node.op == "get_attr":
            weight = weight_of(self.module, str(node.target))
            node.meta["val"] = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
        elif node.op == "call_function":
            node.meta["val"] = _result(node.target, *fx.map_arg((node.args, node.kwargs), lambda other: other.meta["val"]))
        elif node.op == "call_method":
            tensor, *rest = fx.map_arg(node.args, lambda other: other.meta["val"])
            node.meta["val"] = getattr(tensor, str(node.target))(*rest)

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """Nodes that call one of these operators, in order; those that passes put in meanwhile are left out."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and (not targets or node.target in targets) and not node._erased:
                yield node

    def shape(self, node: object) -> tuple[int, ...]:
        """Sizes of a value; () for what is no tensor."""
        value = node.meta["val"] if isinstance(node, fx.Node) else None
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def rank(self, node: object) -> int:
        return len(self.shape(node))

    def constant(self, node: object) -> Tensor | None:
        """The weight that a node reads; None for any other node."""
        return weight_of(self.module, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Calls made inside stand before `node`."""
        with self.graph.inserting_before(node):
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node at the place that `before` says."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["role"] = joined_role(node.all_input_nodes)
        self._fill(node)
        return node

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        """A size as a number, asked for when the graph runs."""
        made = self.graph.call_method("size", (node, dim))
        made.meta["role"] = node.meta["role"]
        self._fill(made)
        return made

    def store(self, name: str, tensor: Tensor) -> fx.Node:
        """A new weight, contiguous."""
        node = self.graph.get_attr(add_weight(self.module, name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        node.meta["role"] = "constant"
        self._fill(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Every reader of `old` reads `new`; `old` and what served it alone are removed."""
        assert self.shape(old) == self.shape(new), (old, self.shape(old), self.shape(new))
        old.replace_all_uses_with(new)
        self._erase(old)

    def _erase(self, node: fx.Node) -> None:
        if node.users or node.op in ("placeholder", "output") or node._erased:
            return
        inputs = node.all_input_nodes
        self.graph.erase_node(node)
        for other in inputs:
            self._erase(other)

    def prune(self) -> None:
        """Remove what nobody reads; inputs stay."""
        for node in reversed(list(self.graph.nodes)):
            self._erase(node)

    def done(self) -> fx.GraphModule:
        """The changed graph, checked for form, with the weights that it reads and no others."""
        self.prune()
        colour(self.graph)
        self.graph.lint()
        return fx.GraphModule(self.module, self.graph, class_name="SidedGraph").eval()
