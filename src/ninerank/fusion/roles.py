"""Who a value of a graph depends on: the request alone, the items alone, both, or neither.

    constant   weights and what follows from them
    request    functions of request inputs alone: one row a request (U rows)
    item       functions of item inputs alone: one row a candidate (B rows), the same for every request
    joint      functions of both, or of `user_row`, which says whose candidate a row is: B rows

The one bridge between the sides is `index_select(x, 0, user_row)`, which repeats the rows of requests for their candidates.
"""

from typing import Literal

import torch
from torch import fx

__all__ = ["USER_ROW", "Role", "colour", "expanded"]

Role = Literal["constant", "request", "item", "joint"]
USER_ROW = "user_row"


def colour(graph: fx.Graph) -> None:
    """Write `meta["role"]` of every node; placeholders have theirs from `meta["input"]`, and other inputs count as joint."""
    for node in graph.nodes:
        if node.op == "placeholder":
            given = node.meta.get("input")
            node.meta["role"] = "joint" if given is None else given.role
        else:
            node.meta["role"] = joined_role(node.all_input_nodes)


def joined_role(nodes: list[fx.Node]) -> Role:
    """Role of a function of these."""
    roles: set[Role] = {node.meta["role"] for node in nodes} - {"constant"}
    if not roles:
        return "constant"
    return roles.pop() if len(roles) == 1 else "joint"


def expanded(node: object) -> fx.Node | None:
    """x where `node` is index_select(x, 0, user_row) of a request value x; None elsewhere."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.aten.index_select.default:
        return None
    source, dim, index = node.args
    assert isinstance(source, fx.Node)
    if dim != 0 or not isinstance(index, fx.Node) or source.meta["role"] != "request":
        return None
    given = index.meta.get("input")
    return source if given is not None and given.name == USER_ROW else None
