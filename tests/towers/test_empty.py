"""Blocks of fields take what a spec or a stream can bring them: no rows, one field, one expert."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ninerank.towers.blocks.bilinear import SENET, BilinearInteraction
from ninerank.towers.blocks.cin import CIN
from ninerank.towers.blocks.experts import CGC, Experts, Gate
from ninerank.towers.blocks.field_attention import FieldSelfAttention
from ninerank.towers.blocks.interaction import CrossMixture
from ninerank.towers.blocks.mask import FieldNorm, MaskBlock
from ninerank.towers.config import MLPConfig

DIM = 4
Make = Callable[[int], nn.Module]
BLOCKS: dict[str, tuple[Make, Callable[[int], tuple[int, ...]]]] = {
    "all": (lambda f: BilinearInteraction(f, DIM, "all"), lambda f: (f * (f - 1) // 2, DIM)),
    "each": (lambda f: BilinearInteraction(f, DIM, "each"), lambda f: (f * (f - 1) // 2, DIM)),
    "interaction": (lambda f: BilinearInteraction(f, DIM, "interaction"), lambda f: (f * (f - 1) // 2, DIM)),
    "senet": (lambda f: SENET(f, 3), lambda f: (f, DIM)),
    "cin": (lambda f: CIN(f, (3, 2)), lambda f: (5,)),
    "attention": (lambda f: FieldSelfAttention(DIM, 2, 3), lambda f: (f, 6)),
    "norm": (lambda f: FieldNorm(f, DIM), lambda f: (f, DIM)),
}


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("fields", [1, 2, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_fields(name: str, fields: int, rows: int) -> None:
    make, shape = BLOCKS[name]
    x = torch.randn(rows, fields, DIM, requires_grad=True)
    out = make(fields)(x)
    assert out.shape == (rows, *shape(fields))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("rows", [0, 2])
def test_blocks_of_flat_inputs(rows: int) -> None:
    x = torch.randn(rows, 6)
    config = MLPConfig(hidden=(3,))
    one: Tensor = Experts(6, 1, config)(x)
    assert one.shape == (rows, 1, 3)
    torch.testing.assert_close(Gate(6, 1)(x, one), one[:, 0])
    outputs = CGC(6, 2, 1, 1, config, has_shared_gate=True)([x, x, x])
    assert [tuple(out.shape) for out in outputs] == [(rows, 3)] * 3
    assert CrossMixture(6, 1, 1)(x, x).shape == (rows, 6)
    assert MaskBlock(6, 6, 5, 0.01)(x, x).shape == (rows, 5)
    assert Experts(6, 2, MLPConfig(hidden=()))(x).shape == (rows, 2, 6)


def test_a_gate_weighs_experts_by_the_softmax_of_its_input() -> None:
    gate = Gate(2, 2)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    share = torch.sigmoid(torch.tensor(3.0))
    mixed = gate(torch.tensor([[3.0, 0.0]]), torch.tensor([[[1.0], [0.0]]]))
    torch.testing.assert_close(mixed, share.view(1, 1))
