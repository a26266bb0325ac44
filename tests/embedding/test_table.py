import copy

import numpy as np
import pytest
import torch

from ninerank.embedding.table import INIT_BLOCK_ROWS, RowGradients, TableGroup, TableLayout, initial_rows


def rows(seed: int, group: str, table: str, num_rows: int, dim: int = 4, std: float = 0.1) -> np.ndarray:
    return np.concatenate([values for _, values in initial_rows(seed, group, table, num_rows, dim, std)])


def test_row_does_not_depend_on_the_size_of_its_table() -> None:
    long = rows(1, "deep", "t", INIT_BLOCK_ROWS + 100)
    for size in (1, 7, INIT_BLOCK_ROWS, INIT_BLOCK_ROWS + 1):
        assert np.array_equal(rows(1, "deep", "t", size), long[:size])


def test_draws_differ_by_seed_group_table_and_block() -> None:
    base = rows(1, "deep", "t", INIT_BLOCK_ROWS + 8)
    for other in (rows(2, "deep", "t", 8), rows(1, "linear", "t", 8), rows(1, "deep", "u", 8), base[INIT_BLOCK_ROWS:]):
        assert not np.array_equal(other, base[:8])


def test_draws_have_the_stated_moments() -> None:
    values = rows(0, "deep", "t", 50_000, dim=8, std=0.02).astype(np.float64)
    assert values.mean() == pytest.approx(0.0, abs=2e-4)
    assert values.std() == pytest.approx(0.02, rel=0.01)
    assert not rows(0, "deep", "t", 5, std=0.0).any()


def test_start_values_stay_what_they_were() -> None:
    want = [[-1.079969882965088, 0.06696950644254684], [0.07293815165758133, -0.49851223826408386]]
    assert rows(2021, "deep", "item_id", 2, dim=2, std=1.0).tolist() == want


def test_merged_sums_each_row_once_over_all_parts() -> None:
    gradients = RowGradients()
    assert gradients.merged() is None
    gradients.add(torch.tensor([5, 2, 5]), torch.tensor([[1.0], [10.0], [2.0]]))
    gradients.add(torch.tensor([2, 9]), torch.tensor([[100.0], [4.0]]))
    merged = gradients.merged()
    assert merged is not None
    assert merged[0].tolist() == [2, 5, 9]
    assert merged[1].tolist() == [[110.0], [3.0], [4.0]]
    gradients.scale_(0.5)
    gradients.add(torch.tensor([9]), torch.tensor([[1.0]]))
    merged = gradients.merged()
    assert merged is not None
    assert merged[1].tolist() == [[55.0], [1.5], [3.0]]
    gradients.clear()
    assert gradients.merged() is None


@pytest.mark.parametrize("threads", [1, 2])
def test_merging_gives_the_same_bits_every_time(threads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    row_N, grad_ND = torch.randint(0, 300, (20_000,), generator=draw), torch.randn(20_000, 16, generator=draw)
    before = torch.get_num_threads()

    def merge() -> torch.Tensor:
        gradients = RowGradients()
        gradients.add(row_N, grad_ND)
        merged = gradients.merged()
        assert merged is not None
        return merged[1]

    torch.set_num_threads(1)
    want = merge()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert torch.equal(merge(), want)
    finally:
        torch.set_num_threads(before)
    reference = torch.zeros(300, 16, dtype=torch.float64).index_add(0, row_N, grad_ND.double())
    torch.testing.assert_close(want.double(), reference[row_N.unique()], atol=1e-4, rtol=1e-5)


def test_two_backward_passes_before_a_merge_add_up() -> None:
    group = TableGroup.drawn("deep", TableLayout.of({"t": 6}), 2, sparse=True, init_std=1.0, seed=0)
    for _ in range(2):
        group.rows(torch.tensor([1, 1, 4])).sum().backward()
    merged = group.gradients.merged()
    assert merged is not None
    assert merged[0].tolist() == [1, 4]
    assert merged[1].tolist() == [[4.0, 4.0], [2.0, 2.0]]


def test_a_copy_of_a_group_is_its_own() -> None:
    group = TableGroup.drawn("deep", TableLayout.of({"t": 6, "u": 2}), 2, sparse=True, init_std=1.0, seed=0)
    twin = copy.deepcopy(group)
    twin.rows(torch.tensor([1])).sum().backward()
    assert group.gradients.merged() is None
    assert "2 tables, 8 rows x 2, sparse" in repr(group)
