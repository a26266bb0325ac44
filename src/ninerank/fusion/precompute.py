"""Candidate-side precompute: what depends on an item alone is a graph of its own, run once an item and not once a request.

    compiled graph  ->  items: item inputs -> values of each item          rest: request inputs, user_row, those values -> logits

The values are what the rest of the graph reads of the item side: the item half of a split first layer, sums over item fields, an item
tower. A cache may hold them by item for as long as the model version is the same. A value is cut out where it has a fixed size, is no
mere view of its input, and is not `MAX_GROWTH` times larger than what it is made from: storing that would cost more than computing
it. What is not cut out stays in the rest, which then reads the item's inputs too.
"""

import math
from dataclasses import dataclass

from torch import fx

from ninerank.fusion.capture import ROWS, GraphInput
from ninerank.fusion.cost import VIEWS
from ninerank.fusion.editor import Editor
from ninerank.fusion.passes.linears import split_items
from ninerank.fusion.roles import colour

__all__ = ["PREFIX", "Precomputed", "precompute_items"]

MAX_GROWTH = 4
PREFIX = "value."


@dataclass(frozen=True)
class Precomputed:
    """items: returns a tuple of tensors, one row an item, in the order of `values`, which are also inputs of `rest`."""

    items: fx.GraphModule
    rest: fx.GraphModule
    values: tuple[GraphInput, ...]

    @property
    def numbers_per_item(self) -> int:
        """How many numbers a cache keeps of an item."""
        return sum(math.prod(size for size in value.dims if isinstance(size, int)) for value in self.values)


def precompute_items(module: fx.GraphModule) -> Precomputed | None:
    """Cut a captured graph in two; None where nothing depends on the item alone but its inputs."""
    editor = Editor(module)
    split_items(editor)
    colour(editor.graph)
    (output,) = editor.graph.find_nodes(op="output")
    needed: set[fx.Node] = set()
    cut: dict[fx.Node, GraphInput] = {}
    reached = [output]
    while reached:
        node = reached.pop()
        for other in node.all_input_nodes:
            if other in needed or other in cut:
                continue
            if _is_worth_keeping(editor, other):
                dtype = other.meta["val"].dtype
                cut[other] = GraphInput(f"{PREFIX}{other.name}", "item", (ROWS, *editor.shape(other)[1:]), dtype)
            else:
                needed.add(other)
                reached.append(other)
    if not cut:
        return None
    order = [node for node in editor.graph.nodes if node in cut]
    values = tuple(cut[node] for node in order)
    return Precomputed(_items(editor, order), _rest(editor, needed, cut, output), values)


def _is_worth_keeping(editor: Editor, node: fx.Node) -> bool:
    shape = editor.shape(node)
    if node.op != "call_function" or node.meta["role"] != "item" or not shape or shape[0] != editor.rows:
        return False
    if any(size in editor.sizes.values() for size in shape[1:]):
        return False
    inputs = sum(math.prod(editor.shape(other)[1:]) for other in node.all_input_nodes if other.meta["role"] == "item")
    own = math.prod(shape[1:])
    return own < inputs if node.target in VIEWS else own <= MAX_GROWTH * inputs


def _items(editor: Editor, order: list[fx.Node]) -> fx.GraphModule:
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    needed: set[fx.Node] = set()
    reached = list(order)
    while reached:
        node = reached.pop()
        if node not in needed:
            needed.add(node)
            reached += node.all_input_nodes
    for node in editor.graph.nodes:
        if node in needed:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in order))
    return _module(editor, graph)


def _rest(editor: Editor, needed: set[fx.Node], cut: dict[fx.Node, GraphInput], output: fx.Node) -> fx.GraphModule:
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in editor.graph.find_nodes(op="placeholder"):
        if node in needed:
            made[node] = graph.node_copy(node, made.__getitem__)
    for node in editor.graph.nodes:
        if node in cut:
            made[node] = graph.placeholder(f"value_{len(made)}")
            made[node].meta["input"] = cut[node]
    for node in editor.graph.nodes:
        if node in needed and node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(fx.map_arg(output.args[0], made.__getitem__))
    return _module(editor, graph)


def _module(editor: Editor, graph: fx.Graph) -> fx.GraphModule:
    graph.lint()
    return fx.GraphModule(editor.module, graph, class_name="SidedGraph").eval()
