"""Frozen ids and rows read as the dynamic table they were made from, for every 64-bit id."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ninerank.embedding.dynamic import DynamicTable, DynamicTableConfig, Frequency
from ninerank.embedding.dynamic.frozen import FrozenIds, freeze
from ninerank.errors import SpecError
from ninerank.features.spec import MISSING_ID

DIMS = {"deep": 3, "linear": 1}
LARGEST = (1 << 63) - 1
EDGES = [0, -1, 1, MISSING_ID, MISSING_ID + 1, LARGEST, LARGEST - 1, 1 << 32, -(1 << 32)]
any_id = st.one_of(st.sampled_from(EDGES), st.integers(-9, 9), st.integers(MISSING_ID, LARGEST))


def trained(ids: list[int], config: DynamicTableConfig | None = None) -> DynamicTable:
    table = DynamicTable("item", DIMS, config or DynamicTableConfig(), seed=5)
    table.lookup(torch.tensor(ids, dtype=torch.int64), train=True, step=0)
    table.finish_step(0)
    return table


@given(st.lists(any_id, max_size=40), st.lists(any_id, max_size=40), st.sampled_from([1, 2]))
def test_frozen_rows_read_as_the_dynamic_table(known: list[int], wanted: list[int], threshold: int) -> None:
    table = trained([own for own in known if own != MISSING_ID], DynamicTableConfig(admission=Frequency(threshold=threshold)))
    id_I, rows = freeze(table.state())
    frozen = FrozenIds("item", id_I)
    assert frozen.num_rows == len(table) + 1 == len(rows["deep"]) == len(rows["linear"])
    ids = torch.tensor([*known, *wanted], dtype=torch.int64)
    own, theirs = torch.from_numpy(frozen.find(ids.numpy())), table.lookup(ids, train=False)
    assert torch.equal(own == 0, theirs == 0)
    for group in DIMS:
        assert torch.equal(rows[group][own].view(torch.int32), table.rows(group, theirs).view(torch.int32))


def test_the_row_of_an_id_is_one_more_than_its_place() -> None:
    id_I, _ = freeze(trained([5, -5, LARGEST, 0]).state())
    assert id_I.tolist() == [-5, 0, 5, LARGEST]
    assert FrozenIds("item", id_I).find(np.array([LARGEST, 5, 1, 0, -5, MISSING_ID])).tolist() == [4, 3, 0, 2, 1, 0]


def test_an_id_that_says_missing_is_left_behind() -> None:
    table = trained([MISSING_ID, 4])
    id_I, rows = freeze(table.state())
    assert id_I.tolist() == [4]
    assert torch.equal(rows["deep"], torch.cat([torch.zeros(1, 3), table.rows("deep", table.lookup(torch.tensor([4]), train=False))]))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 5000])
@pytest.mark.parametrize("stride", [1, 1 << 40, (1 << 63) // 5000])
def test_every_id_is_found_and_no_other(count: int, stride: int) -> None:
    ids = torch.arange(count) * stride - count // 2
    frozen = FrozenIds("item", ids)
    assert frozen.find(ids.flip(0).numpy()).tolist() == list(range(count, 0, -1))
    assert np.count_nonzero(frozen.find(torch.cat([ids[:1] - 1, ids[-1:] + 1]).numpy())) == 0
    assert frozen.num_index_bytes <= max(64, 16 * count)


def test_rows_may_take_the_place_of_their_ids() -> None:
    frozen = FrozenIds("item", torch.arange(100) * 3)
    values = np.arange(1000)
    wanted = frozen.find(values)
    assert frozen.find(values, values) is values
    assert np.array_equal(values, wanted)


def test_ids_stay_mapped_from_their_file(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(100)}, tmp_path / "item.safetensors")
    with safe_open(tmp_path / "item.safetensors", framework="pt") as opened:
        ids = opened.get_tensor("ids")
    assert FrozenIds("item", ids)._ids.ctypes.data == ids.data_ptr()


def test_threads_may_read_at_once() -> None:
    frozen = FrozenIds("item", torch.arange(20_000) * 7)
    wanted = np.arange(-100, 140_100)
    expected = np.where((wanted % 7 == 0) & (wanted >= 0) & (wanted < 140_000), wanted // 7 + 1, 0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: frozen.find(wanted), range(16)):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.tensor([1, 1]), "must rise strictly"),
        (torch.tensor([2, 1]), "must rise strictly"),
        (torch.tensor([MISSING_ID, 1]), "stands for missing"),
        (torch.tensor([1, 2], dtype=torch.int32), "ids are torch.int32"),
        (torch.tensor([[1, 2]]), r"\(1, 2\) on cpu; a list of int64"),
        (torch.tensor([1, 2], device="meta"), "on meta"),
    ],
)
def test_ids_that_are_no_rising_list_are_refused(ids: torch.Tensor, said: str) -> None:
    with pytest.raises(SpecError, match=f"table 'item': .*{said}"):
        FrozenIds("item", ids)
