"""The fused update of every optimizer against its float64 reference and against torch's own optimizers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.errors import SpecError
from ninerank.fusion.kernels.embedding_update import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    RowOptimizer,
    RowwiseAdagrad,
    embedding_update,
    row_optimizers,
)

OPTIMIZERS = (SGD, Adagrad, RowwiseAdagrad, Adam, FTRL)
# dim, table, mapped entries, scaled entries
VARIANTS = (
    (16, torch.float32, True, False),
    (16, torch.float32, True, True),
    (3, torch.float16, False, False),
    (16, torch.bfloat16, True, False),
)
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@st.composite
def optimizers(draw: st.DrawFn, kinds: tuple[type[RowOptimizer], ...]) -> RowOptimizer:
    settings_ = {
        "weight_decay": draw(st.sampled_from([0.0, 0.01])),
        "max_gradient": draw(st.sampled_from([None, 0.25])),
        "max_row_norm": draw(st.sampled_from([None, 1.0])),
    }
    kind = draw(st.sampled_from(kinds))
    if kind is FTRL:
        settings_ |= {"l1": draw(st.sampled_from([0.0, 0.05])), "l2": draw(st.sampled_from([0.0, 0.1])), "initial_accumulator": 0.1}
    return kind(**settings_)


@settings(max_examples=250)
@given(data=st.data())
@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_agrees_with_float64_reference(data: st.DataObject, kind: type[RowOptimizer]) -> None:
    dim, table, mapped, scaled = data.draw(st.sampled_from(VARIANTS))
    optimizer = data.draw(optimizers((kind,)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    num_rows, entries = data.draw(st.sampled_from([1, 2, 40, 5000])), data.draw(st.integers(0, 200))
    first_row = torch.tensor([0, num_rows // 3, num_rows // 2])
    lr = torch.tensor([0.1, 0.01, 0.5])
    weight = torch.randn(num_rows, dim, generator=generator).to(table)
    exact = weight.double()
    state = optimizer.new_state(weight, _of_row(lr, first_row, num_rows))
    exact_state = [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in state]
    for _ in range(3):
        outputs = int(torch.randint(1, 50, (), generator=generator)) if mapped else entries
        # Multiples of 1/8 add up exactly: Adam's first steps depend on the sign of a sum alone.
        grad = torch.randint(-8, 9, (outputs, dim), generator=generator) / 8
        rows = torch.randint(0, data.draw(st.sampled_from([1, num_rows])), (entries,), generator=generator).to(torch.int32)
        grad_row = torch.randint(0, outputs, (entries,), generator=generator).to(torch.int32) if mapped else None
        scale = torch.randint(-3, 4, (entries,), generator=generator) / 4 if scaled else None
        grad_scale = data.draw(st.sampled_from([None, torch.tensor(0.5)]))
        options = {"grad_row_N": grad_row, "scale_N": scale, "grad_scale": grad_scale}
        before = weight.clone()
        embedding_update(weight, state, grad, rows, first_row, lr, optimizer, **options, kernel="numba")
        embedding_update(exact, exact_state, grad.double(), rows, first_row, lr, optimizer, **options, kernel="torch")
        tolerance = 2e-5 if table == torch.float32 else ROUNDING[table] * 1.01
        torch.testing.assert_close(weight.double(), exact, rtol=tolerance, atol=max(tolerance, 2e-5))
        for found, expected in zip(state, exact_state, strict=True):
            torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-4, atol=1e-4)
        untouched = torch.ones(num_rows, dtype=torch.bool).index_fill(0, rows.long(), False)
        assert torch.equal(weight[untouched], before[untouched])
        exact = weight.double()
        exact_state = [tensor.double() if tensor.is_floating_point() else tensor.clone() for tensor in state]


@pytest.mark.parametrize("dim", [1, 5, 7, 15, 17, 100])
@pytest.mark.parametrize("row_type", [torch.int32, torch.int64])
def test_any_dim_and_a_gradient_that_is_not_contiguous(dim: int, row_type: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    weight, optimizer = torch.randn(30, dim, generator=generator), Adagrad()
    grad = torch.randn(2 * dim, 100, generator=generator).t()[::2, ::2]
    assert not grad.is_contiguous()
    rows = torch.randint(0, 30, (50,), generator=generator).to(row_type)
    exact = weight.double()
    state, exact_state = optimizer.new_state(weight, torch.ones(1)), optimizer.new_state(exact, torch.ones(1))
    embedding_update(weight, state, grad, rows, torch.tensor([0]), torch.tensor([0.1]), optimizer, kernel="numba")
    exact_state = [tensor.double() for tensor in exact_state]
    embedding_update(exact, exact_state, grad.double(), rows, torch.tensor([0]), torch.tensor([0.1]), optimizer, kernel="torch")
    torch.testing.assert_close(weight.double(), exact, rtol=1e-5, atol=1e-5)


def _of_row(lr_T: torch.Tensor, first_row_T: torch.Tensor, num_rows: int) -> torch.Tensor:
    return lr_T[torch.searchsorted(first_row_T, torch.arange(num_rows), right=True) - 1]


@pytest.mark.parametrize(
    ("optimizer", "torch_optimizer"),
    [
        (SGD(weight_decay=0.01), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01)),
        (Adagrad(eps=1e-10), lambda p: torch.optim.Adagrad(p, lr=0.1)),
        (Adam(), lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_equals_torch_where_every_row_is_touched(optimizer: RowOptimizer, torch_optimizer: object) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(7, 16, generator=generator)
    dense = torch.nn.Parameter(weight.clone())
    other = torch_optimizer([dense])  # type: ignore[operator]
    state = optimizer.new_state(weight, torch.tensor([0.1]))
    for _ in range(20):
        dense.grad = torch.randn(7, 16, generator=generator)
        embedding_update(weight, state, dense.grad, torch.arange(7), torch.tensor([0]), torch.tensor([0.1]), optimizer)
        other.step()
    torch.testing.assert_close(weight, dense.detach(), rtol=1e-5, atol=1e-5)


def test_adam_counts_each_rows_own_steps() -> None:
    weight, optimizer = torch.zeros(2, 16), Adam()
    state = optimizer.new_state(weight, torch.tensor([0.1]))
    one, first, lr = torch.ones(1, 16), torch.tensor([0]), torch.tensor([0.1])
    for _ in range(3000):
        embedding_update(weight, state, one, torch.tensor([0]), first, lr, optimizer)
    embedding_update(weight, state, one, torch.tensor([1]), first, lr, optimizer)
    assert state[2].tolist() == [3000, 1]
    assert weight[0, 0].item() == pytest.approx(-300, rel=1e-4)
    assert weight[1, 0].item() == pytest.approx(-0.1, rel=1e-5)


def test_ftrl_starts_from_the_initial_weights() -> None:
    weight = torch.tensor([[0.5, -0.25, 1e-3, 0.0]] * 2)
    optimizer, before = FTRL(l1=0.01, l2=0.1), weight.clone()
    state = optimizer.new_state(weight, torch.tensor([0.1]))
    embedding_update(weight, state, torch.zeros(1, 4), torch.tensor([1]), torch.tensor([0]), torch.tensor([0.1]), optimizer)
    torch.testing.assert_close(weight, before)


def test_each_table_has_its_learning_rate() -> None:
    weight = torch.zeros(6, 16)
    embedding_update(weight, [], torch.ones(6, 16), torch.arange(6), torch.tensor([0, 2, 5]), torch.tensor([1.0, 0.0, 3.0]), SGD())
    assert weight[:, 0].tolist() == [-1, -1, 0, 0, 0, -3]


def test_clips_before_weight_decay() -> None:
    weight = torch.ones(1, 4)
    embedding_update(
        weight,
        [],
        torch.full((2, 4), 3.0),
        torch.tensor([0, 0]),
        torch.tensor([0]),
        torch.tensor([1.0]),
        SGD(max_gradient=2.0, weight_decay=0.5),
    )
    assert weight[0].tolist() == [-1.5] * 4
    weight = torch.zeros(1, 4)
    embedding_update(
        weight, [], torch.full((2, 4), 3.0), torch.tensor([0, 0]), torch.tensor([0]), torch.tensor([1.0]), SGD(max_row_norm=4.0)
    )
    assert weight[0].tolist() == [-2.0] * 4


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_same_bits_for_any_number_of_threads(kind: type[RowOptimizer], num_threads: int) -> None:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(30_000, 16, generator=generator)
    optimizer = kind()
    state = optimizer.new_state(weight, torch.tensor([0.1]))
    first_row, lr = torch.arange(3) * 10_000, torch.full((3,), 0.1)
    for _ in range(3):
        rows = (torch.rand(3000, generator=generator) ** 4 * 30_000).to(torch.int32)
        grad_row = torch.randint(0, 900, (3000,), generator=generator).to(torch.int32)
        embedding_update(weight, state, torch.randn(900, 16, generator=generator), rows, first_row, lr, optimizer, grad_row_N=grad_row)
    if num_threads == 1:
        _ANSWERS[kind] = [weight, *state]
    assert all(torch.equal(found, expected) for found, expected in zip([weight, *state], _ANSWERS[kind], strict=True))


_ANSWERS: dict[type[RowOptimizer], list[torch.Tensor]] = {}


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bad", [9, -1])
def test_nothing_is_changed_by_a_row_outside_the_storage(kernel: str, bad: int, num_threads: int) -> None:
    weight = torch.zeros(9, 16)
    with pytest.raises(IndexError):
        embedding_update(
            weight, [], torch.ones(4, 16), torch.tensor([0, bad, 4, 8]), torch.tensor([0]), torch.ones(1), SGD(), kernel=kernel
        )
    assert not weight.any()


def test_a_diverged_gradient_is_seen() -> None:
    weight = torch.zeros(3, 16)
    grad = torch.tensor([[float("nan")] * 16, [float("inf")] * 16])
    embedding_update(weight, [], grad, torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), SGD())
    assert bool(weight[0].isnan().all())
    assert bool(weight[1].isinf().all())
    assert not weight[2].any()


def test_wrong_arguments_are_refused() -> None:
    weight, grad, rows, first, lr = torch.zeros(4, 2), torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]), torch.ones(1)
    with pytest.raises(ValueError, match=r"adagrad has state \('sum',\); 0 tensors were given"):
        embedding_update(weight, [], grad, rows, first, lr, Adagrad())
    with pytest.raises(ValueError, match="state 'sum' has shape"):
        embedding_update(weight, [torch.zeros(3, 2)], grad, rows, first, lr, Adagrad())
    with pytest.raises(ValueError, match="2 learning rates"):
        embedding_update(weight, [], grad, rows, first, torch.ones(2), SGD())
    with pytest.raises(ValueError, match="one dim needed"):
        embedding_update(weight, [], torch.zeros(1, 3), rows, first, lr, SGD())
    with pytest.raises(SpecError, match="did you mean 'adagrad'"):
        torch.ops.ninerank.embedding_update(weight, [], grad, rows, None, None, first, lr, None, "adagrat", [], "auto")


def test_every_optimizer_is_listed_by_its_kind() -> None:
    assert {kind: optimizer().kind for kind, optimizer in row_optimizers().items()} == {kind: kind for kind in row_optimizers()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [SGD, Adam], ids=lambda kind: kind.__name__)
def test_operator_contract(kind: type[RowOptimizer]) -> None:
    weight, optimizer = torch.randn(5, 16), kind()
    state = optimizer.new_state(weight, torch.tensor([0.1]))
    arguments = (weight, state, torch.randn(2, 16), torch.tensor([0, 4]), None, None, torch.tensor([0]), torch.ones(1), None)
    torch.library.opcheck(torch.ops.ninerank.embedding_update.default, (*arguments, optimizer.kind, optimizer.hyper, "auto"))  # type: ignore[attr-defined]
