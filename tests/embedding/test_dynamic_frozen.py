"""A frozen table reads as the dynamic table it was made from, for every 64-bit id."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ninerank.embedding.dynamic import DynamicTable, DynamicTableConfig, Frequency
from ninerank.embedding.dynamic.frozen import FrozenTable
from ninerank.errors import DataError, SpecError
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
def test_a_frozen_table_reads_as_the_dynamic_one(known: list[int], wanted: list[int], threshold: int) -> None:
    table = trained([own for own in known if own != MISSING_ID], DynamicTableConfig(admission=Frequency(threshold=threshold)))
    frozen = FrozenTable.of_state("item", table.state())
    assert (len(frozen), frozen.dims) == (len(table), DIMS)
    ids = torch.tensor([*known, *wanted], dtype=torch.int64)
    own, theirs = frozen.prepare(ids), table.lookup(ids, train=False)
    assert torch.equal(own == 0, theirs == 0)
    for group in DIMS:
        assert torch.equal(frozen.rows(group, own).view(torch.int32), table.rows(group, theirs).view(torch.int32))


def test_the_row_of_an_id_is_one_more_than_its_place() -> None:
    frozen = FrozenTable.of_state("item", trained([5, -5, LARGEST, 0]).state())
    assert frozen.ids.tolist() == [-5, 0, 5, LARGEST]
    assert frozen.prepare(torch.tensor([[LARGEST, 5, 1], [0, -5, MISSING_ID]])).tolist() == [[4, 3, 0], [2, 1, 0]]


def test_an_id_that_says_missing_is_left_behind() -> None:
    frozen = FrozenTable.of_state("item", trained([MISSING_ID, 4]).state())
    assert frozen.ids.tolist() == [4]
    assert frozen.prepare(torch.tensor([MISSING_ID, 4])).tolist() == [0, 1]
    assert frozen.values("deep").shape == (2, 3)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 5000])
@pytest.mark.parametrize("stride", [1, 1 << 40, (1 << 63) // 5000])
def test_every_id_is_found_and_no_other(count: int, stride: int) -> None:
    ids = torch.arange(count) * stride - count // 2
    frozen = FrozenTable("item", ids, {"linear": torch.zeros(count + 1, 1)})
    assert frozen.prepare(ids.flip(0)).tolist() == list(range(count, 0, -1))
    assert frozen.prepare(torch.cat([ids[:1] - 1, ids[-1:] + 1])).count_nonzero() == 0
    assert frozen.num_index_bytes <= max(64, 16 * count)


def test_rows_and_ids_stay_mapped_from_their_file(tmp_path: Path) -> None:
    table = trained(list(range(100)))
    frozen = FrozenTable.of_state("item", table.state())
    save_file({"ids": frozen.ids, "rows.deep": frozen.values("deep")}, tmp_path / "item.safetensors")
    with safe_open(tmp_path / "item.safetensors", framework="pt") as opened:
        ids, rows = opened.get_tensor("ids"), opened.get_tensor("rows.deep")
    mapped = FrozenTable("item", ids, {"deep": rows})
    assert mapped.ids.data_ptr() == ids.data_ptr()
    assert mapped.values("deep").data_ptr() == rows.data_ptr()
    wanted = torch.arange(-3, 103)
    assert torch.equal(mapped.rows("deep", mapped.prepare(wanted)), table.rows("deep", table.lookup(wanted, train=False)))


def test_threads_may_read_at_once() -> None:
    ids = torch.arange(20_000) * 7
    frozen = FrozenTable("item", ids, {"linear": torch.arange(20_001.0)[:, None]})
    wanted = torch.arange(-100, 140_100)
    expected = torch.where((wanted % 7 == 0) & (wanted >= 0) & (wanted < 140_000), wanted // 7 + 1, 0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: frozen.prepare(wanted), range(16)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("ids", "rows", "said"),
    [
        (torch.tensor([1, 1]), torch.zeros(3, 1), "must rise strictly"),
        (torch.tensor([2, 1]), torch.zeros(3, 1), "must rise strictly"),
        (torch.tensor([MISSING_ID, 1]), torch.zeros(3, 1), "stands for missing"),
        (torch.tensor([1, 2], dtype=torch.int32), torch.zeros(3, 1), "ids are torch.int32"),
        (torch.tensor([[1, 2]]), torch.zeros(3, 1), r"\(1, 2\); a list of int64"),
        (torch.tensor([1, 2]), torch.zeros(2, 1), "float32 of 3 rows are needed"),
        (torch.tensor([1, 2]), torch.zeros(3), "float32 of 3 rows are needed"),
        (torch.tensor([1, 2]), torch.zeros(3, 1, dtype=torch.float16), "rows of 'deep' are torch.float16"),
        (torch.tensor([1, 2]), torch.ones(3, 1), "row 0 of 'deep', which ids without a row read, is not zero"),
    ],
)
def test_ids_and_rows_that_do_not_fit_are_refused(ids: torch.Tensor, rows: torch.Tensor, said: str) -> None:
    with pytest.raises(SpecError, match=f"table 'item': .*{said}"):
        FrozenTable("item", ids, {"deep": rows})


def test_ids_of_another_type_and_steps_are_refused() -> None:
    frozen = FrozenTable.of_state("item", trained([1]).state())
    with pytest.raises(DataError, match=r"table 'item': ids are torch.int32 on cpu; int64 on cpu is needed"):
        frozen.prepare(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match="only read"):
        frozen.prepare(torch.tensor([1]), step=3)
