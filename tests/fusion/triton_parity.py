"""The Triton kernels against the float64 references, on the device that NINERANK_TRITON_DEVICE names.

Run by test_triton.py: in Triton's interpreter (cpu, TRITON_INTERPRET=1), which must be chosen before Triton is imported,
and on a GPU where there is one.
"""

import os
from collections.abc import Callable

import pytest
import torch

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.dot_interaction import dot_interaction
from ninerank.fusion.kernels.embedding_bag import embedding_bag
from ninerank.fusion.kernels.embedding_reduce import embedding_reduce
from ninerank.fusion.kernels.embedding_sequence import embedding_sequence
from ninerank.fusion.kernels.embedding_update import FTRL, SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad, embedding_update
from ninerank.fusion.kernels.fm_interaction import fm_interaction
from ninerank.fusion.kernels.hstu_attention import hstu_attention
from ninerank.fusion.kernels.jagged_attention import jagged_attention
from ninerank.fusion.kernels.jagged_pairs import jagged_pairs
from ninerank.fusion.kernels.launch import Tile
from ninerank.fusion.kernels.low_rank_cross import low_rank_cross
from ninerank.fusion.kernels.mlp_layer import mlp_layer
from ninerank.fusion.kernels.quantized_rows import quantized_rows, row_bytes
from ninerank.fusion.kernels.sigmoid_gate import sigmoid_gate

DEVICE = torch.device(os.environ.get("NINERANK_TRITON_DEVICE", "cpu"))
BLOCK = Tile.of(16, "cuda").rows
TABLES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _on_device(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


@pytest.fixture(autouse=True)
def only_triton_runs() -> object:
    """What was asked for by name is what ran."""
    with registry.count_dispatches() as counts:
        yield
    assert "triton" in {kernel for _, kernel in counts}


@pytest.mark.parametrize(
    ("table", "dim"), [(torch.float32, 1), (torch.float32, 3), (torch.float32, 64), (torch.float16, 16), (torch.bfloat16, 10)]
)
@pytest.mark.parametrize("options", ["single", "single-weighted", "jagged", "jagged-mean", "jagged-weighted-mean"])
@pytest.mark.parametrize("feature_major", [True, False])
def test_embedding_bag(table: torch.dtype, dim: int, options: str, feature_major: bool) -> None:
    generator = _draw(dim)
    num_features, num_bags, num_rows = 3, 45, 50
    lengths = torch.randint(0, 5, (num_features * num_bags,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]) if "jagged" in options else None
    num_ids = int(lengths.sum()) if "jagged" in options else num_features * num_bags
    weight = torch.randn(num_rows, dim, generator=generator).to(table)
    rows = torch.randint(0, num_rows, (num_ids,), generator=generator).to(torch.int32)
    sample = torch.randn(num_ids, generator=generator) if "weighted" in options else None
    mean = torch.tensor([True, False, True]) if "mean" in options else None
    layout = {"feature_major": feature_major}
    expected = embedding_bag(weight.double(), rows, offsets, num_features, sample_weight_N=sample, mean_F=mean, **layout, kernel="torch")
    weight, rows, offsets, sample, mean = _on_device(weight, rows, offsets, sample, mean)
    found = embedding_bag(weight, rows, offsets, num_features, sample_weight_N=sample, mean_F=mean, **layout, kernel="triton")
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bags", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("jagged", [True, False])
def test_sizes_around_a_block(bags: int, jagged: bool) -> None:
    weight, rows = torch.randn(50, 16, generator=_draw(1)), torch.arange(bags, dtype=torch.int32) % 50
    offsets = torch.arange(bags + 1) if jagged else None
    weight_, rows_, offsets_ = _on_device(weight, rows, offsets)
    assert torch.equal(embedding_bag(weight_, rows_, offsets_, 1, kernel="triton").cpu()[:, 0], weight[rows.long()])


def test_rows_outside_the_storage_are_zero() -> None:
    weight, rows, offsets = _on_device(
        torch.ones(4, 16), torch.tensor([0, 4, -1, 3, 2**31 - 1], dtype=torch.int32), torch.tensor([0, 2, 5])
    )
    assert embedding_bag(weight, rows, None, 1, kernel="triton")[:, 0, 0].tolist() == [1, 0, 0, 1, 0]
    assert embedding_bag(weight, rows, offsets, 1, kernel="triton")[:, 0, 0].tolist() == [1, 1]


@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("dim", [1, 16, 20])
@pytest.mark.parametrize("max_length", [None, 6, 9])
def test_embedding_sequence(table: torch.dtype, dim: int, max_length: int | None) -> None:
    generator = _draw(dim)
    lengths = torch.randint(0, 7, (33,), generator=generator)
    weight = torch.randn(40, dim, generator=generator).to(table)
    rows = torch.randint(0, 40, (int(lengths.sum()),), generator=generator).to(torch.int32)
    offsets = None if max_length is None else torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    weight_, rows_, offsets_ = _on_device(weight, rows, offsets)
    found = embedding_sequence(weight_, rows_, offsets_, max_length or 0, kernel="triton")
    assert torch.equal(found.cpu(), embedding_sequence(weight, rows, offsets, max_length or 0, kernel="torch"))


def test_empty_sequences() -> None:
    weight, rows, offsets = _on_device(torch.ones(4, 16), torch.zeros(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int64))
    assert not embedding_sequence(weight, rows, offsets, 2, kernel="triton").any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 64])
@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_quantized_rows(bits: int, dim: int, count: int) -> None:
    generator = _draw(dim)
    storage = torch.randint(0, 256, (40, row_bytes(dim, bits)), generator=generator, dtype=torch.uint8)
    storage.view(torch.float32)[:, :2] = torch.randn(40, 2, generator=generator)
    rows = torch.randint(0, 40, (count,), generator=generator).to(torch.int32 if dim > 2 else torch.int64)
    storage_, rows_ = _on_device(storage, rows)
    found = quantized_rows(storage_, rows_, dim, bits, kernel="triton")
    torch.testing.assert_close(found.cpu(), quantized_rows(storage, rows, dim, bits, kernel="torch"), rtol=2e-7, atol=6e-5)


def test_quantized_rows_that_are_not_there_are_zero() -> None:
    storage, rows = _on_device(torch.full((3, row_bytes(16, 8)), 1, dtype=torch.uint8), torch.tensor([-1, 3, 2], dtype=torch.int32))
    found = quantized_rows(storage, rows, 16, 8, kernel="triton")
    assert found.any(dim=1).tolist() == [False, False, True]


@pytest.mark.parametrize("entries", [0, 1, 200, 5000])
@pytest.mark.parametrize("hot", [1, 3, 10**6])
@pytest.mark.parametrize("scaled", [True, False])
def test_embedding_reduce(entries: int, hot: int, scaled: bool) -> None:
    generator = _draw(entries)
    grad = torch.randint(-8, 9, (70, 16), generator=generator) / 8
    rows = torch.randint(0, min(hot, 3000), (entries,), generator=generator).to(torch.int32)
    grad_row = torch.randint(0, 70, (entries,), generator=generator).to(torch.int32)
    scale = torch.randint(-4, 5, (entries,), generator=generator) / 4 if scaled else None
    expected_rows, expected = embedding_reduce(grad, rows, grad_row, scale, 3000, kernel="torch")
    found_rows, found = embedding_reduce(*_on_device(grad, rows, grad_row, scale), 3000, kernel="triton")
    assert torch.equal(found_rows.cpu(), expected_rows)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("kind", [SGD, Adagrad, RowwiseAdagrad, Adam, FTRL], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("table", "dim"), [(torch.float32, 3), (torch.float32, 16), (torch.float16, 64), (torch.bfloat16, 16)])
@pytest.mark.parametrize(("limited", "hot"), [(True, 2), (False, 900)])
def test_embedding_update(kind: type[RowOptimizer], table: torch.dtype, dim: int, limited: bool, hot: int) -> None:
    generator = _draw(dim)
    optimizer = kind(weight_decay=0.01, max_gradient=0.5, max_row_norm=1.0) if limited else kind()
    if kind is FTRL:
        optimizer = optimizer.model_copy(update={"l1": 0.05, "l2": 0.1, "initial_accumulator": 0.1})
    num_rows, entries, outputs = 900, 300, 80
    first_row, lr = torch.tensor([0, 300, 450]), torch.tensor([0.1, 0.01, 0.5])
    weight = torch.randn(num_rows, dim, generator=generator).to(table)
    lr_R = lr[torch.searchsorted(first_row, torch.arange(num_rows), right=True) - 1]
    state = optimizer.new_state(weight, lr_R)
    on_device, device_state = weight.to(DEVICE), [tensor.to(DEVICE) for tensor in state]
    for step in range(2):
        exact = on_device.cpu().double()
        exact_state = [tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu().clone() for tensor in device_state]
        grad = torch.randint(-8, 9, (outputs, dim), generator=generator) / 8
        rows = torch.randint(0, hot, (entries,), generator=generator).to(torch.int32)
        grad_row = torch.randint(0, outputs, (entries,), generator=generator).to(torch.int32)
        scale = torch.randint(-4, 5, (entries,), generator=generator) / 4 if limited else None
        grad_scale = torch.tensor(0.5) if step else None
        options = {"grad_row_N": grad_row, "scale_N": scale, "grad_scale": grad_scale}
        embedding_update(exact, exact_state, grad.double(), rows, first_row, lr, optimizer, **options, kernel="torch")
        grad_, rows_, first_row_, lr_ = _on_device(grad, rows, first_row, lr)
        there = dict(zip(options, _on_device(*options.values()), strict=True))
        embedding_update(on_device, device_state, grad_, rows_, first_row_, lr_, optimizer, **there, kernel="triton")
        torch.testing.assert_close(on_device.cpu().double(), exact, rtol=ROUNDING[table], atol=max(ROUNDING[table], 2e-5))
        for found, expected in zip(device_state, exact_state, strict=True):
            torch.testing.assert_close(found.cpu().to(expected.dtype), expected, rtol=1e-4, atol=1e-4)


def test_update_of_nothing() -> None:
    weight, grad, rows, first_row, lr = _on_device(
        torch.ones(4, 16), torch.ones(0, 16), torch.zeros(0, dtype=torch.int32), torch.tensor([0]), torch.ones(1)
    )
    embedding_update(weight, [], grad, rows, first_row, lr, SGD(), kernel="triton")
    assert bool((weight == 1).all())


@pytest.mark.parametrize("bad", [-1, 4])
def test_update_refuses_a_row_outside(bad: int) -> None:
    weight, grad, rows, first_row, lr = _on_device(
        torch.ones(4, 16), torch.ones(1, 16), torch.tensor([bad]), torch.tensor([0]), torch.ones(1)
    )
    with pytest.raises(IndexError, match="not all in the storage of 4 rows"):
        embedding_update(weight, [], grad, rows, first_row, lr, SGD(), kernel="triton")
    assert bool((weight == 1).all())


def _jagged(num_histories: int, dim: int) -> tuple[torch.Tensor, ...]:
    """Query, key, score, offsets and gradients of pairs and sums; every third history is empty, and one is long."""
    generator = _draw(num_histories)
    lengths = torch.randint(0, 5, (num_histories,), generator=generator)
    lengths[::3] = 0
    lengths[num_histories // 2 : num_histories // 2 + 1] = 37
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count = int(offsets[-1])
    shapes = ((num_histories, dim), (count, dim), (count,), (count, 3 * dim))
    query, key, score, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, score, offsets, grad, torch.randn(num_histories, dim, generator=generator)


@pytest.mark.parametrize("num_histories", [0, 1, 40, BLOCK + 1])
@pytest.mark.parametrize("dim", [1, 3, 16, 20])
def test_jagged_operators(num_histories: int, dim: int) -> None:
    query, key, score, offsets, grad, sum_grad = _jagged(num_histories, dim)

    def run(kernel: str, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        values = [value.to(device, dtype).requires_grad_() for value in (query, key, score)]
        own = offsets.to(device)
        found = []
        for out, upstream in (
            (jagged_pairs(values[0], values[1], own, kernel=kernel), grad),
            (jagged_attention(values[2], values[1], own, kernel=kernel), sum_grad),
            (jagged_attention(values[2], values[1], own, softmax=True, kernel=kernel), sum_grad),
        ):
            grads = torch.autograd.grad(out, values, upstream.to(device, dtype), allow_unused=True)
            found += [out.detach(), *(own_grad for own_grad in grads if own_grad is not None)]
        return [value.cpu().double() for value in found]

    expected = run("torch", torch.device("cpu"), torch.float64)
    for one, other in zip(run("triton", DEVICE, torch.float32), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("dim", [1, 7, 16, 80])
@pytest.mark.parametrize("bf16_out", [False, True])
def test_sigmoid_gate(dim: int, bf16_out: bool) -> None:
    x = torch.randn(37, dim)
    vectors = [torch.randn(dim) for _ in range(4)]
    found = sigmoid_gate(*_on_device(x, *vectors), bf16_out, kernel="triton")
    expected = sigmoid_gate(x, *vectors, bf16_out, kernel="torch")
    assert torch.allclose(found.cpu().float(), expected.float(), atol=1e-5, rtol=1e-2 if bf16_out else 1e-5)


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("dim", [1, 7, 16])
def test_sigmoid_gate_gradients(rows: int, dim: int) -> None:
    _agrees(sigmoid_gate, [torch.randn(rows, dim, generator=_draw(1)), *(torch.randn(dim, generator=_draw(i)) for i in range(4))])


def _agrees(operator: Callable[..., torch.Tensor], values: list[torch.Tensor]) -> None:
    """Triton's result and gradients are those of the float64 reference."""
    found = []
    for kernel, device, dtype in (("triton", DEVICE, torch.float32), ("torch", torch.device("cpu"), torch.float64)):
        own = [value.to(device, dtype).requires_grad_() for value in values]
        out = operator(*own, kernel=kernel)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(device, dtype)
        found.append([value.detach().cpu().double() for value in (out, *torch.autograd.grad(out, own, upstream))])
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("rows", [0, 1, 16, 45])
@pytest.mark.parametrize("width", [3, 16, 128, 150])
def test_low_rank_cross(rows: int, width: int) -> None:
    shapes = ((rows, width), (2, 4, width), (2, 4, width), (2, width))
    _agrees(low_rank_cross, [torch.randn(shape, generator=_draw(i)) * 0.3 for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("rows", [0, 1, 5, BLOCK + 1])
@pytest.mark.parametrize(("fields", "dim"), [(1, 4), (2, 1), (3, 16), (9, 10)])
def test_interactions(rows: int, fields: int, dim: int) -> None:
    values = [torch.randn(rows, fields, dim, generator=_draw(rows))]
    _agrees(fm_interaction, values)
    _agrees(dot_interaction, values if rows < BLOCK else [values[0][:20]])


@pytest.mark.parametrize("rows", [0, 1, 16, 45])
@pytest.mark.parametrize("width", [3, 16, 128, 150])
@pytest.mark.parametrize(("activation", "masked"), [("relu", False), ("none", True), ("relu", True)])
def test_mlp_layer(rows: int, width: int, activation: str, masked: bool) -> None:
    shapes = [(rows, 5), (width, 5), (width,), *([(rows, width)] if masked else [])]

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *mask: torch.Tensor, kernel: str) -> torch.Tensor:
        return mlp_layer(x, weight, bias, activation, *mask, kernel=kernel)

    _agrees(layer, [torch.randn(shape, generator=_draw(i)) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("num_histories", [0, 1, 30])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim", "distances"), [(1, 3, 5, 1), (2, 16, 16, 4), (2, 4, 8, 30)])
def test_hstu_attention(num_histories: int, heads: int, key_dim: int, value_dim: int, distances: int) -> None:
    *_, offsets, _, _ = _jagged(num_histories, 1)
    count = int(offsets[-1])
    shapes = [(count, heads, key_dim), (count, heads, key_dim), (count, heads, value_dim), (distances,)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor, *, kernel: str) -> torch.Tensor:
        return hstu_attention(q, k, v, position, offsets.to(q.device), 0.1, kernel=kernel)

    _agrees(attend, [torch.randn(shape, generator=_draw(i)) for i, shape in enumerate(shapes)])
