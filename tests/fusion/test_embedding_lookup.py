"""Ids looked up in one pass: the same rows and bags as `embedding_rows` and `embedding_bag` give, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_bag import embedding_bag
from ninerank.fusion.kernels.embedding_lookup import embedding_lookup
from ninerank.fusion.kernels.embedding_rows import IdRangeError, OutOfRange, embedding_rows
from ninerank.fusion.kernels.embedding_update import SGD
from ninerank.fusion.lookup import looked_up

FIRST, SIZES = torch.tensor([0, 10, 13]), torch.tensor([10, 3, 7])
# dim, table, ids, offsets (None: one id a bag), sample weights, means: each compiled once.
VARIANTS = (
    (16, torch.float32, torch.int64, None, False, False),
    (16, torch.float32, torch.int32, None, True, False),
    (8, torch.float16, torch.int64, None, False, True),
    (3, torch.bfloat16, torch.int64, None, True, False),
    (16, torch.float32, torch.int64, torch.int64, True, True),
    (10, torch.bfloat16, torch.int32, torch.int32, False, True),
)


@settings(max_examples=250)
@given(st.integers(0, 2**31), st.integers(0, 40), st.sampled_from(VARIANTS), st.booleans())
def test_agrees_with_float64_reference(seed: int, num_bags: int, variant: tuple[Any, ...], feature_major: bool) -> None:
    dim, table, id_type, offset_type, weighted, mean = variant
    generator = torch.Generator().manual_seed(seed)
    offsets, count = None, 3 * num_bags
    if offset_type is not None:
        lengths = torch.randint(0, 4, (3 * num_bags,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(offset_type)
        count = int(offsets[-1])
    weight = torch.randn(20, dim, generator=generator).to(table)
    values = torch.randint(-5, 25, (count,), generator=generator).to(id_type)
    arguments = (values, offsets, FIRST, SIZES)
    options: dict[str, Any] = {
        "policy_F": torch.tensor([OutOfRange.CLAMP, OutOfRange.DEFAULT, OutOfRange.CLAMP], dtype=torch.uint8),
        "sample_weight_N": torch.randn(count, generator=generator) if weighted else None,
        "mean_F": torch.tensor([True, False, True]) if mean else None,
        "feature_major": feature_major,
    }
    found, rows = embedding_lookup(weight, *arguments, **options, kernel="numba")
    expected, expected_rows = embedding_lookup(weight.double(), *arguments, **options, kernel="torch")
    assert found.dtype == torch.float32
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize("dim", [16, 12, 10])
def test_equals_rows_and_bags_at_any_size(dim: int, feature_major: bool, num_threads: int) -> None:
    """Many shares, outputs that go past the cache, shares that end within a feature."""
    generator = torch.Generator().manual_seed(dim)
    sizes = torch.tensor([50_000, 7, 1, 1200, 90])
    first = sizes.cumsum(0) - sizes
    weight = torch.randn(int(sizes.sum()), dim, generator=generator)
    for num_bags in (1, 1639, 4096, 30_011 if dim >= 12 else 5000):
        values = torch.cat([torch.randint(0, int(size), (num_bags,), generator=generator) for size in sizes])
        out, rows = embedding_lookup(weight, values, None, first, sizes, feature_major=feature_major)
        assert torch.equal(rows, embedding_rows(values, None, first, sizes, None, len(weight)))
        assert torch.equal(out, embedding_bag(weight, rows, None, 5, feature_major=feature_major))
        by_hand = weight[rows.long()].view(5, num_bags, dim)
        assert torch.equal(out, by_hand if feature_major else by_hand.transpose(0, 1))


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bad", [3, -1, 2**40])
def test_an_id_outside_its_table_is_named(kernel: str, bad: int, num_threads: int) -> None:
    weight, values = torch.zeros(20, 16), torch.tensor([0, 9, 2, bad, bad, 6])
    with pytest.raises(
        IdRangeError, match=rf"feature 'item': id {bad} \(number 3 of the batch\) is outside its table of 3 rows; allowed: 0 to 2"
    ):
        embedding_lookup(weight, values, None, FIRST, SIZES, names=("user", "item", "hour"), kernel=kernel)
    with pytest.raises(IdRangeError, match="feature number 1"):
        embedding_lookup(weight, values, torch.tensor([0, 0, 2, 2, 5, 5, 6]), FIRST, SIZES, kernel=kernel)


def test_the_first_of_many_refused_ids_is_named(num_threads: int) -> None:
    """Whatever share it is in, and whoever meets it."""
    values = torch.zeros(3 * 20_000, dtype=torch.int64)
    values[[13_333, 19_999, 20_001, 45_000]] = 99
    with pytest.raises(IdRangeError, match=r"feature number 0: id 99 \(number 13333 of the batch\)"):
        embedding_lookup(torch.zeros(20, 16), values, None, FIRST, SIZES)


def test_gradient_goes_to_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.ones(20, 16))
    lr = torch.tensor([0.1, 0.2, 0.3])
    out = looked_up(
        *(weight, torch.tensor([9, 9, 0, 0, 6, 5]), None, FIRST, SIZES),
        on_grad=lambda grad: grad.apply(weight, [], FIRST, lr, SGD()),
    )
    assert out.shape == (2, 3, 16)
    out.sum().backward()
    expected = torch.ones(20)
    expected[[9, 10, 18, 19]] = torch.tensor([0.8, 0.6, 0.7, 0.7])
    torch.testing.assert_close(weight.detach()[:, 0], expected)
    with torch.no_grad():
        assert not looked_up(weight, torch.tensor([0, 0, 0]), None, FIRST, SIZES, on_grad=lambda grad: None).requires_grad


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_no_bags(kernel: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    for offsets in (None, torch.zeros(1, dtype=torch.int64)):
        out, rows = embedding_lookup(torch.zeros(20, 16), empty, offsets, FIRST, SIZES, kernel=kernel)
        assert out.shape == (0, 3, 16)
        assert rows.numel() == 0


def test_wrong_arguments_are_refused() -> None:
    weight, values = torch.zeros(20, 16), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="tables take the rows 0 to 19; the storage has 19"):
        embedding_lookup(weight[:19], values, None, FIRST, SIZES)
    with pytest.raises(ValueError, match="do not share out over 3 features"):
        embedding_lookup(weight, values[:2], None, FIRST, SIZES)
    with pytest.raises(TypeError, match=r"ids are torch.float32; allowed: torch.int32, torch.int64"):
        embedding_lookup(weight, values.float(), None, FIRST, SIZES)
    with pytest.raises(ValueError, match="1 sample weights for 3 ids"):
        embedding_lookup(weight, values, None, FIRST, SIZES, sample_weight_N=torch.ones(1))


def test_one_dispatch() -> None:
    with registry.count_dispatches() as counts:
        embedding_lookup(torch.zeros(20, 16), torch.tensor([0, 1, 2]), None, FIRST, SIZES)
    assert counts == {("embedding_lookup", "numba"): 1}


def test_operator_contract() -> None:
    arguments = (torch.zeros(20, 16), torch.tensor([0, 1, 2]), None, FIRST, SIZES, None, None, None, False, "auto")
    torch.library.opcheck(torch.ops.ninerank.embedding_lookup.default, arguments)
