import copy

import numpy as np
import pytest
import torch

from ninerank.embedding.table import INIT_BLOCK_ROWS, TableGroup, TableLayout, initial_rows


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


def test_two_backward_passes_before_a_merge_add_up() -> None:
    group = TableGroup.drawn("deep", TableLayout.of({"t": 6}), 2, sparse=True, init_std=1.0, seed=0)
    for _ in range(2):
        group.rows(torch.tensor([1, 1, 4])).sum().backward()
    summed = group.gradients.coalesced(6)
    assert summed is not None
    assert summed.rows_N.tolist() == [1, 4]
    assert summed.grad_GD.tolist() == [[4.0, 4.0], [2.0, 2.0]]


def test_a_copy_of_a_group_is_its_own() -> None:
    group = TableGroup.drawn("deep", TableLayout.of({"t": 6, "u": 2}), 2, sparse=True, init_std=1.0, seed=0)
    twin = copy.deepcopy(group)
    twin.rows(torch.tensor([1])).sum().backward()
    assert not group.gradients
    assert "2 tables, 8 rows x 2, sparse" in repr(group)
