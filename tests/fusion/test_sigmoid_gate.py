import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.fusion.backends.gates import fuse_gates
from ninerank.fusion.backends.onednn import pack_linears
from ninerank.fusion.capture import ROWS, GraphInput, capture
from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import jit
from ninerank.fusion.kernels.lanes import exponential
from ninerank.fusion.kernels.sigmoid_gate import sigmoid_gate

DIMS = [1, 3, 4, 7, 8, 12, 16, 17, 40, 80, 100, 300]


@settings(max_examples=120, deadline=None)
@given(
    dim=st.sampled_from(DIMS),
    rows=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bf16_out=st.booleans(),
    spread=st.sampled_from([0.1, 4.0, 60.0]),
    seed=st.integers(0, 999),
)
def test_equals_the_float64_reference(dim: int, rows: int, dtype: torch.dtype, bf16_out: bool, spread: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, rows, dim, generator=draw) * spread).to(dtype)
    vectors = [torch.randn(dim, generator=draw) for _ in range(4)]
    got = sigmoid_gate(x, *vectors, bf16_out, kernel="numba")
    want = sigmoid_gate(x.double(), *(vector.double() for vector in vectors), kernel="torch")
    assert got.shape == x.shape
    assert got.dtype == (torch.bfloat16 if bf16_out else torch.float32)
    size = x.double().abs() * (vectors[2].abs() + vectors[3].abs()).double() + 1e-30  # base and slope may cancel
    assert bool(((got.double() - want).abs() <= size * (2**-8 if bf16_out else 1e-5)).all())


def test_the_exponential_is_right_over_its_whole_range() -> None:
    compute = exponential(0)

    @jit
    def each(x, out):
        for i in range(x.shape[0]):
            out[i] = compute(x[i])

    x = torch.cat([torch.linspace(-87.2, 87.9, 200_001), torch.tensor([0.0, -0.0, 1e-30])])
    out = torch.empty_like(x)
    each(x.numpy(), out.numpy())
    want = x.double().exp()
    assert float(((out.double() - want) / want).abs().max()) < 4e-7
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1000.0, -1000.0])
    out = torch.empty_like(special)
    each(special.numpy(), out.numpy())
    assert out[0].isnan()
    assert out[1:].tolist() == [pytest.approx(float(torch.tensor(b).double().exp()), rel=1e-6) for b in (88.0, -87.3, 88.0, -87.3)]


def test_what_is_not_finite_stays_so() -> None:
    x, one = torch.tensor([[float("nan"), float("inf"), -300.0, 300.0]]), torch.ones(4)
    out = sigmoid_gate(x, one, one, one, one, kernel="numba")
    assert out[0, 0].isnan()
    assert out[0, 1:].tolist() == [float("inf"), -300.0, 600.0]


def test_wrong_arguments_are_refused() -> None:
    one = torch.ones(4)
    with pytest.raises(ValueError, match="contiguous float32"):
        sigmoid_gate(torch.ones(4, 3).t(), *[torch.ones(4)] * 4)
    with pytest.raises(ValueError, match="scale has shape"):
        sigmoid_gate(torch.ones(2, 4), one, torch.ones(3), one, one)
    torch.library.opcheck(torch.ops.ninerank.sigmoid_gate.default, (torch.ones(2, 4), one, one, one, one, True, "torch"))


class Gated(torch.nn.Module):
    """Dice in evaluation, as the affine pass leaves it, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(24, 32), torch.nn.Linear(32, 16)
        for name in ("shift", "scale", "base", "slope"):
            self.register_buffer(name, torch.randn(32))

    def forward(self, inputs):
        x = self.first(inputs["x"])
        return self.second(x * torch.addcmul(self.base, torch.sigmoid(torch.addcmul(self.shift, x, self.scale)), self.slope))


@pytest.mark.parametrize("bf16", [False, True])
def test_graphs_take_it_with_the_conversions_around_it(bf16: bool) -> None:
    torch.manual_seed(0)
    module = Gated().eval()
    graph = capture(module, [GraphInput("x", "item", (ROWS, 24))])
    x = torch.randn(5, 24)
    assert fuse_gates(graph) == 1
    with torch.inference_mode():
        torch.testing.assert_close(graph(x), module({"x": x}))
        assert pack_linears(graph, bf16=bf16) == 2
        torch.testing.assert_close(graph(x), module({"x": x}), rtol=1e-5, atol=0.1 if bf16 else 1e-6)
    conversions = [node for node in graph.graph.nodes if node.target is torch.ops.aten.to.dtype]
    # The input and the output of the graph. None around the gate.
    assert len(conversions) == (2 if bf16 else 0)
    assert fuse_gates(graph) == 0


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(DIMS), st.sampled_from([0, 1, 5, 127, 128, 300]), st.sampled_from([0.1, 4.0]), st.integers(0, 999))
def test_gradients_equal_the_float64_reference(dim: int, rows: int, spread: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((rows, dim), *[(dim,)] * 4)
    values = [torch.randn(shape, generator=draw) * (1.0 if i else spread) for i, shape in enumerate(shapes)]
    grad, found = torch.randn(rows, dim, generator=draw), []
    for dtype in (torch.float32, torch.float64):
        own = [value.to(dtype).requires_grad_() for value in values]
        out = sigmoid_gate(*own, kernel="numba" if dtype == torch.float32 else "torch")
        found.append([value.double() for value in torch.autograd.grad(out, own, grad.to(dtype))])
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-4)


def test_gradcheck() -> None:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((2, 3, 4), *[(4,)] * 4)]
    assert torch.autograd.gradcheck(lambda *own: sigmoid_gate(*own, kernel="torch"), values)


def test_gradients_have_the_same_bits_for_any_number_of_threads(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=draw).requires_grad_() for shape in ((700, 16), *[(16,)] * 4)]
    found = torch.autograd.grad(sigmoid_gate(*values).sum(), values)
    monkeypatch.setattr(threads, "num_threads_for", lambda num_elements: 1)
    assert all(torch.equal(*pair) for pair in zip(found, torch.autograd.grad(sigmoid_gate(*values).sum(), values), strict=True))


def test_backward_operator_contract() -> None:
    draw = torch.Generator().manual_seed(2)
    values = [torch.randn(shape, generator=draw) for shape in ((5, 8), (5, 8), *[(8,)] * 4)]
    torch.library.opcheck(torch.ops.ninerank.sigmoid_gate_backward.default, (*values, "auto"))
    torch.library.opcheck(torch.ops.ninerank.sigmoid_gate.default, (*(value.requires_grad_() for value in values[1:]), False, "auto"))
