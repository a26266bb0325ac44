"""What the NPU's backend makes of a graph: attention of fields by one operator with the same result, and nothing else touched."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, fx, nn

from ninerank.fusion.backends.copies import own_copy, stands_for
from ninerank.fusion.backends.npu import fuse_attention
from ninerank.fusion.capture import ROWS, GraphInput, capture
from ninerank.towers.blocks.field_attention import FieldSelfAttention

INPUTS = (GraphInput("fields", "item", (ROWS, 5, 8)),)


@torch.library.custom_op("ninerank_tests::fusion_attention", mutates_args=())
def fusion_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *, scale: float) -> tuple[Tensor, Tensor]:
    """The first of what npu_fusion_attention returns, in the one layout that is asked for."""
    assert input_layout == "BSND"
    assert query.shape[2] == head_num
    turned = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    out = nn.functional.scaled_dot_product_attention(*turned, scale=scale)
    return out.transpose(1, 2).contiguous(), out.new_zeros(1)


ATTENTION = torch.ops.ninerank_tests.fusion_attention.default


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FieldSelfAttention(8, 2, 4), FieldSelfAttention(8, 4, 2)
        self.out = nn.Linear(40, 1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.out(self.second(self.first(inputs["fields"])).flatten(1))
        return logits


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    torch.manual_seed(0)
    return capture(Tower().eval(), INPUTS)


def test_attention_is_one_operator_with_the_same_result(graph: fx.GraphModule) -> None:
    fused = own_copy(graph)
    assert fuse_attention(fused, ATTENTION) == 2
    targets = [node.target for node in fused.graph.nodes]
    assert targets.count(ATTENTION) == 2
    assert torch.ops.aten.softmax.int not in targets
    assert [node.args[3] for node in fused.graph.nodes if node.target is ATTENTION] == [2, 4]
    for rows in (1, 7):
        fields = torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(fused(fields), graph(fields), rtol=1e-5, atol=1e-6)
    known = {node.name for node in graph.graph.nodes}
    layers = {stands_for(user) for node in fused.graph.nodes if node.target is ATTENTION for user in node.users}
    assert layers <= known
    assert None not in layers


@pytest.mark.parametrize("place", [0, 1])
def test_other_arguments_are_left_alone(graph: fx.GraphModule, place: int) -> None:
    """A softmax over another dimension, a transposition of others: not this attention."""
    changed = own_copy(graph)
    target, value = ((torch.ops.aten.softmax.int, 2), (torch.ops.aten.transpose.int, 3))[place]
    for node in changed.graph.nodes:
        if node.target is target:
            node.args = (*node.args[:-1], value)
    assert fuse_attention(changed, ATTENTION) == 0


def test_a_graph_without_attention_stays(graph: fx.GraphModule) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 1)

        def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
            logits: Tensor = self.out(torch.softmax(inputs["fields"], 2).sum(1))
            return logits

    plain = capture(Plain().eval(), INPUTS)
    copy = own_copy(plain)
    assert fuse_attention(copy, ATTENTION) == 0
    assert [node.target for node in copy.graph.nodes] == [node.target for node in plain.graph.nodes]
