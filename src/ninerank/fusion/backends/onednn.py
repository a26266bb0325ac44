"""Linear layers as oneDNN runs them: weights packed once, activation in the same pass, float32 or bfloat16.

    linear -> relu     one operator; a bias may be computed, as the request half of a split layer is
    bfloat16           weights and activations of hidden layers; sums in float32; the last layer in float32

The graph's other operators run as they are. An operand in bfloat16 is rounded to 8 bits of mantissa, so that scores move by up to
about 1e-3: what calls this holds the scores to a budget.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ninerank.fusion.backends.gates import absorb_conversions
from ninerank.fusion.backends.weights import constant_of
from ninerank.fusion.capture import add_weight
from ninerank.fusion.cost import VIEWS
from ninerank.fusion.roles import colour

__all__ = ["has_packed_linear", "pack_linears", "rounded_inputs"]

aten = torch.ops.aten
CACHED = 1 << 18  # numbers of a matrix that one row is multiplied with from the cache
SMALL = 16  # outputs of a layer that is not worth packing: a logit
ACTIVATIONS: dict[Any, str] = {aten.relu.default: "relu", aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh"}


def has_packed_linear() -> bool:
    """Whether this build of torch has the operators."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch._C._has_mkldnn)


def pack_linears(module: fx.GraphModule, *, bf16: bool, one_request: bool = False, num_rows: int = 256) -> int:
    """Turn the graph's linear layers into packed ones, in place; returns how many.

    num_rows: rows to pack for. one_request: what depends on the request alone has one row, which a plain product of a matrix that stays in
    the cache serves best.
    """
    colour(module.graph)
    packed = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is aten.linear.default:
            packed += _pack(module, node, bf16, one_request, num_rows)
    if bf16:
        _round_products(module)
        _drop_round_trips(module.graph)
        module.graph.eliminate_dead_code()
        absorb_conversions(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return packed


def _pack(module: fx.GraphModule, node: fx.Node, bf16: bool, one_request: bool, num_rows: int) -> bool:
    weight = constant_of(module, node.args[1])
    bias = node.args[2] if len(node.args) > 2 else None
    if weight is None or weight.shape[0] < SMALL or weight.dtype != torch.float32:
        return False
    if one_request and node.meta["role"] == "request" and weight.numel() <= CACHED:
        return False
    graph, last, activation = module.graph, node, "none"
    users = list(last.users)
    if len(users) == 1 and users[0].target in ACTIVATIONS:
        last, activation = users[0], ACTIVATIONS[users[0].target]
    dtype = torch.bfloat16 if bf16 else torch.float32
    name = f"packed_{sum(1 for n in graph.nodes if n.op == 'get_attr')}"
    module.register_buffer(name, torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), num_rows))
    with graph.inserting_before(last):
        packed, source, vector = graph.get_attr(name), node.args[0], bias
        if bf16:
            source = graph.call_function(aten.to.dtype, (source, dtype))
            fixed = constant_of(module, vector)
            if fixed is not None:
                module.register_buffer(f"{name}_bias", fixed.to(dtype))
                vector = graph.get_attr(f"{name}_bias")
            elif vector is not None:
                vector = graph.call_function(aten.to.dtype, (vector, dtype))
        made = graph.call_function(torch.ops.mkldnn._linear_pointwise.default, (source, packed, vector, activation, [], ""))
        result = graph.call_function(aten.to.dtype, (made, torch.float32)) if bf16 else made
    last.replace_all_uses_with(result)
    return True


def _round_products(module: fx.GraphModule) -> None:
    """Batched products with weights (`fusion.passes.parallel`) in bfloat16, which oneDNN multiplies as it does packed ones."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.baddbmm.default):
        bias, source, weight = (constant_of(module, node.args[0]), node.args[1], constant_of(module, node.args[2]))
        if bias is None or weight is None or weight.dtype != torch.float32 or min(weight.shape[1:]) < SMALL or node.kwargs:
            continue
        names = [add_weight(module, f"rounded.{node.name}.{place}", value.to(torch.bfloat16)) for place, value in enumerate((bias, weight))]
        with graph.inserting_before(node):
            rounded = graph.call_function(aten.to.dtype, (source, torch.bfloat16))
            stored = [graph.get_attr(name) for name in names]
            product = graph.call_function(aten.baddbmm.default, (stored[0], rounded, stored[1]))
            node.replace_all_uses_with(graph.call_function(aten.to.dtype, (product, torch.float32)))


def _drop_round_trips(graph: fx.Graph) -> None:
    """x -> float32 -> bfloat16 is x where x is bfloat16."""
    for node in list(graph.nodes):
        if node.target is aten.to.dtype and node.args[1] is torch.bfloat16:
            source = node.args[0]
            if isinstance(source, fx.Node) and source.target is aten.to.dtype and source.args[1] is torch.float32:
                node.replace_all_uses_with(source.args[0])


def rounded_inputs(graphs: Sequence[fx.GraphModule]) -> dict[str, torch.dtype]:
    """Inputs by name that every one of the graphs rounds to bfloat16 before anything else, or does not read."""
    found: dict[str, torch.dtype] = {}
    for node in graphs[0].graph.find_nodes(op="placeholder"):
        name = node.meta["input"].name
        same = [other for module in graphs for other in module.graph.find_nodes(op="placeholder") if other.meta["input"].name == name]
        if any(other.users for other in same) and all(_is_rounded(other) for other in same):
            found[name] = torch.bfloat16
    return found


def _is_rounded(node: fx.Node) -> bool:
    return all(
        (user.target is aten.to.dtype and user.args[1] is torch.bfloat16) or (user.target in VIEWS and _is_rounded(user))
        for user in node.users
    )
