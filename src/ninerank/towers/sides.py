"""A tower over inputs whose request side and item side are apart: the graph that the compiler starts from.

    tower(x_request[user_row] joined with x_item)

Everything before the join depends on one side alone, so that a compiler can move the expansion of the request side behind whatever
needs the request alone. `EmbeddingCollection.sides` makes the inputs.

Shape legend: U requests, B candidates, F fields, D embedding dim, L sequence length, T tasks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ninerank.fusion.capture import REQUESTS, ROWS, GraphInput
from ninerank.fusion.roles import USER_ROW

__all__ = ["SidedTower", "graph_inputs", "joined"]


def joined(sides: Mapping[str, Tensor], groups: Sequence[str], request_sequences: Sequence[str]) -> dict[str, Tensor]:
    """A tower's inputs from `EmbeddingCollection.sides`: request rows repeated for their candidates, sides side by side.

    request_sequences: names of the sequences of the request side.
    """
    user_row_B = sides["user_row"]

    def expanded(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, user_row_B)

    inputs = {name: torch.cat([expanded(sides[f"{name}.request"]), sides[f"{name}.item"]], dim=1) for name in ("dense", *groups)}
    for key, value in sides.items():
        if ".seq." in key or key.startswith("mask."):
            name = key.rpartition(".seq.")[2].removeprefix("mask.")
            inputs[key] = expanded(value) if name in request_sequences else value
    return inputs


class SidedTower(nn.Module):
    """logits_BT of `tower`, a function of sides."""

    def __init__(self, tower: nn.Module, groups: Sequence[str], request_sequences: Sequence[str]) -> None:
        super().__init__()
        self.tower = tower
        self.groups, self.request_sequences = tuple(groups), tuple(request_sequences)

    def forward(self, sides: Mapping[str, Tensor]) -> Tensor:
        """sides: as `EmbeddingCollection.sides` gives them."""
        logits_BT: Tensor = self.tower(joined(sides, self.groups, self.request_sequences))
        return logits_BT


def graph_inputs(sides: Mapping[str, Tensor], request_sequences: Sequence[str]) -> list[GraphInput]:
    """What a graph of sides needs to know of its inputs: side, sizes that differ from call to call, type. sides: one example."""
    inputs = []
    for key, value in sides.items():
        is_sequence = ".seq." in key or key.startswith("mask.")
        name = key.rpartition(".seq.")[2].removeprefix("mask.")
        is_request = name in request_sequences if is_sequence else key.endswith(".request")
        lengths: tuple[int | str, ...] = (f"L.{name}", *value.shape[2:]) if is_sequence else tuple(value.shape[1:])
        dims = (REQUESTS if is_request else ROWS, *lengths)
        inputs.append(GraphInput(key, "joint" if key == USER_ROW else "request" if is_request else "item", dims, value.dtype))
    return inputs
