"""A graph of a backend's own, whose nodes remember which values of the original they give.

A backend rewrites its copy: two operators become one, a layer is followed by a conversion. Whoever compares two devices layer by layer
(`ninerank parity`) must know which node of one graph gives what a node of the other does; names change, `meta["stands_for"]` stays.
"""

from functools import partial

import torch
from torch import fx

__all__ = ["own_copy", "stands_for"]

_KEY = "stands_for"


def own_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same weights; a node that replaces another inherits what that one stands for."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta[_KEY] = node.name
    copy = fx.GraphModule(module, graph, "Lowered").eval()
    copy._register_replace_node_hook(partial(_inherit, copy))
    return copy


def stands_for(node: fx.Node) -> str | None:
    """Name of the node of the original graph whose value `node` gives; None for a value that the original does not have."""
    name: str | None = node.meta.get(_KEY)
    return name


def _inherit(module: fx.GraphModule, *, old: fx.Node, new: str, user: fx.Node) -> None:
    """torch calls it for every use of `old` that comes to read the node named `new`."""
    name = old.meta.get(_KEY)
    taker = next((node for node in module.graph.nodes if node.name == new), None)
    while name is not None and taker is not None and _KEY not in taker.meta:
        taker.meta[_KEY] = name
        # A conversion may be dropped later, and what it converts then stands in its place.
        source = taker.args[0] if taker.target is torch.ops.aten.to.dtype else None
        taker = source if isinstance(source, fx.Node) else None
