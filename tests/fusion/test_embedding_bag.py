"""Pooled lookup against its float64 reference, its gradients, and what it refuses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.fusion.kernels.embedding_bag import embedding_bag

RandomLookups = Callable[..., st.SearchStrategy[Any]]


@settings(max_examples=300)
@given(data=st.data())
def test_agrees_with_float64_reference(data: st.DataObject, random_lookups: RandomLookups) -> None:
    case = data.draw(random_lookups())
    found = embedding_bag(case.weight_RD, case.rows_N, case.offsets, case.num_features, **case.options, kernel="numba")
    expected = embedding_bag(case.weight_RD.double(), case.rows_N, case.offsets, case.num_features, **case.options, kernel="torch")
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


def test_layouts_and_empty_bags() -> None:
    weight = torch.eye(4)
    rows, offsets = torch.tensor([3, 1, 1, 0]), torch.tensor([0, 1, 1, 1, 4])
    out = embedding_bag(weight, rows, offsets, 2)
    assert out[0, 0].tolist() == [0, 0, 0, 1]
    assert out[1, 0].tolist() == out[0, 1].tolist() == [0, 0, 0, 0]
    assert out[1, 1].tolist() == [1, 2, 0, 0]
    assert torch.equal(embedding_bag(weight, rows, offsets, 2, feature_major=True), out.transpose(0, 1))


def test_same_bits_for_any_number_of_threads(num_threads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 16, generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 30, (60,), generator=generator).cumsum(0)])
    rows = torch.randint(0, 50, (int(offsets[-1]),), generator=generator).to(torch.int32)
    out = embedding_bag(weight, rows, offsets, 3)
    one_by_one = torch.stack([weight[rows[a:b].long()].sum(0) for a, b in itertools.pairwise(offsets)])
    torch.testing.assert_close(out, one_by_one.view(3, 20, 16).transpose(0, 1))
    if num_threads == 1:
        _ANSWERS["one thread"] = out
    assert torch.equal(out, _ANSWERS["one thread"])


_ANSWERS: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bad", [6, -1, 2**31 - 1])
def test_a_row_outside_the_storage_is_refused(kernel: str, bad: int, num_threads: int) -> None:
    with pytest.raises(IndexError):
        embedding_bag(torch.zeros(6, 16), torch.tensor([0, 1, bad, 5], dtype=torch.int32), None, 1, kernel=kernel)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_dense_gradients(kernel: str) -> None:
    generator = torch.Generator().manual_seed(5)
    offsets = torch.tensor([0, 2, 2, 5, 6, 9, 9])
    rows = torch.tensor([1, 1, 3, 0, 3, 2, 1, 1, 1])
    mean = torch.tensor([True, False])
    coefficient = torch.randn(3, 2, 16, generator=generator)
    grads = []
    for dtype, name in ((torch.float64, "torch"), (torch.float32, kernel)):
        weight = torch.randn(5, 16, generator=generator.manual_seed(6)).to(dtype).requires_grad_()
        sample = torch.randn(9, generator=generator.manual_seed(7)).to(dtype).requires_grad_()
        out = embedding_bag(weight, rows, offsets, 2, sample_weight_N=sample, mean_F=mean, kernel=name)
        (out * coefficient.to(out.dtype)).sum().backward()
        assert weight.grad is not None
        assert sample.grad is not None
        grads.append((weight.grad, sample.grad))
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert grads[0][0][4].abs().sum() == 0


def test_gradcheck_of_the_reference() -> None:
    rows, offsets, mean = torch.tensor([1, 0, 2, 2, 2]), torch.tensor([0, 2, 2, 4, 5]), torch.tensor([False, True])
    weight, sample = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, s: embedding_bag(w, rows, offsets, 2, sample_weight_N=s, mean_F=mean, kernel="torch"), (weight, sample)
    )


def test_half_tables_learn_densely() -> None:
    weight = torch.ones(3, 16, dtype=torch.float16, requires_grad=True)
    embedding_bag(weight, torch.tensor([2, 2]), None, 1).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float16
    assert weight.grad[:, 0].tolist() == [0, 0, 2]


def test_wrong_arguments_are_refused() -> None:
    weight, rows = torch.zeros(4, 2), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="3 bags do not share out over 2 features"):
        embedding_bag(weight, rows, None, 2)
    with pytest.raises(ValueError, match="contiguous"):
        embedding_bag(weight.t(), rows, None, 1)
    with pytest.raises(ValueError, match=r"rows are torch.float32"):
        embedding_bag(weight, rows.float(), None, 1)
    with pytest.raises(ValueError, match="1 sample weights for 3 ids"):
        embedding_bag(weight, rows, None, 1, sample_weight_N=torch.ones(1))
    with pytest.raises(ValueError, match="mean_F holds 2 features of 1"):
        embedding_bag(weight, rows, None, 1, mean_F=torch.ones(2, dtype=torch.bool))


def test_hostile_offsets_stay_inside() -> None:
    offsets = torch.tensor([0, 2**40, -7, 3, 2])
    out = embedding_bag(torch.ones(4, 16), torch.tensor([0, 1, 2]), offsets, 1)
    assert out.shape == (4, 1, 16)


@pytest.mark.parametrize("sample", [None, torch.tensor([0.5, 1.0, 2.0, 3.0])])
def test_operator_contract(sample: torch.Tensor | None) -> None:
    weight, rows = torch.randn(5, 16, requires_grad=True), torch.tensor([0, 4, 4, 1])
    offsets = torch.tensor([0, 3, 4])
    arguments = (weight, rows, offsets, sample, torch.tensor([True]), 1, False, "auto")
    torch.library.opcheck(torch.ops.ninerank.embedding_bag.default, arguments)


def test_exports_with_a_dynamic_batch() -> None:
    class Pool(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(9, 16))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return embedding_bag(self.weight, rows.t().reshape(-1), None, 3)

    module = Pool()
    rows = torch.randint(0, 9, (4, 3))
    program = torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    wider = torch.randint(0, 9, (11, 3))
    assert torch.equal(program.module()(wider), module(wider))
