"""Reserved memory: zero until touched, grown in place, moved block by block where the reservation runs out."""

import resource
from pathlib import Path

import numpy as np
import pytest

from ninerank.embedding.dynamic import IdMap, reserve
from ninerank.embedding.dynamic.reserve import Region, RowArray
from ninerank.embedding.dynamic.rules import FusedRule
from ninerank.embedding.dynamic.storage import RowStorage
from ninerank.fusion.kernels.embedding_update import RowwiseAdagrad


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")


@needs_proc
def test_a_region_costs_only_what_is_touched() -> None:
    before = resident_bytes()
    array = RowArray(1 << 26, 8, np.float32)
    assert array.num_rows == 1 << 26
    array.rows[: 1 << 17] = 1.0  # 4 MiB
    assert 3 << 20 <= resident_bytes() - before <= 12 << 20
    assert not array.rows[1 << 25].any()


@needs_proc
def test_released_pages_are_given_back() -> None:
    region = Region(64 << 20)
    content = np.frombuffer(region.memory, np.uint8)
    content[:] = 1
    before = resident_bytes()
    region.release(1, (64 << 20) - 1)
    assert before - resident_bytes() > 60 << 20
    assert content[0] == content[-1] == 1  # only whole pages within the bounds go


@pytest.mark.parametrize("width", [0, 3])
def test_moving_keeps_the_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "MOVE_BYTES", 1000)
    array = RowArray(10, width, np.float64)
    array.rows[:] = np.arange(array.rows.size).reshape(array.rows.shape)
    content = array.rows.copy()
    array.ensure(10, 10)
    assert array.num_rows == 10
    array.ensure(11, 10)
    assert array.num_rows == 20
    assert (array.rows[:10] == content).all()
    array.ensure(5000, 10)
    assert array.num_rows == 5000
    assert (array.rows[:10] == content).all()
    assert not array.rows[10:].any()


@needs_proc
def test_a_move_needs_one_block_more_than_the_rows() -> None:
    array = RowArray(1 << 21, 16, np.float32)  # 128 MiB
    array.rows[:] = 1.0
    before = resident_bytes()
    peak = []
    release = Region.release

    def measured(region: Region, first: int, stop: int) -> None:
        peak.append(resident_bytes())
        release(region, first, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Region, "release", measured)
        array.ensure((1 << 21) + 1, 1 << 21)
    assert max(peak) - before < 40 << 20
    assert resident_bytes() - before < 24 << 20
    assert (array.rows[: 1 << 21] == 1.0).all()


@needs_proc
def test_a_rehash_needs_no_more_than_the_new_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old slots go as they are copied: at no time are both held in full."""
    ids = IdMap()
    ids.put(np.arange(3_000_000), np.arange(1, 3_000_001))
    assert ids.num_bytes == 64 << 20
    before, peak, release = resident_bytes(), [], Region.release

    def measured(region: Region, first: int, stop: int) -> None:
        peak.append(resident_bytes())
        release(region, first, stop)

    monkeypatch.setattr(Region, "release", measured)
    ids.grow()
    assert ids.num_bytes == 128 << 20
    assert max(peak) - before < 100 << 20  # 64 MiB more are held in the end, both together would be 128 MiB more
    assert ids.find(np.array([0, 2_999_999, 3_000_000])).tolist() == [1, 3_000_000, 0]


def test_a_refused_reservation_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that counts reservations as memory: the greatest that it grants is taken."""
    grant = 1000 * 8

    class Strict(Region):
        def __init__(self, num_bytes: int) -> None:
            if num_bytes > grant:
                raise MemoryError(num_bytes)
            super().__init__(num_bytes)

    monkeypatch.setattr(reserve, "Region", Strict)
    array = RowArray(1 << 20, 1, np.float64)
    assert 500 <= array.num_rows <= 1000
    with pytest.raises(MemoryError):
        array.ensure(1001, 0)


def test_more_than_the_address_space_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="address space"):
        Region(1 << 62)


def test_rows_given_up_are_given_out_first() -> None:
    rule = FusedRule(RowwiseAdagrad(initial_accumulator=0.5), 0.05)
    storage = RowStorage("t", {"deep": 2}, rule, std=1.0, seed=0, rows=4)
    storage.ensure(10)
    assert storage.num_rows == 10
    storage.used = 5
    storage.open(np.arange(1, 5), np.arange(11, 15), 3)
    storage.touch(np.array([1, 2, 2, 4, 0, 0]), 5, 7)
    assert storage.live().tolist() == [1, 2, 4]
    assert storage.book["count"].tolist() == [0, 1, 2, 0, 1]
    assert storage.book["last_seen"].tolist() == [0, 5, 5, 3, 5]
    assert storage.book["version"].tolist() == [0, 7, 7, 0, 7]
    assert storage.states("deep")["sum"].view(-1).tolist() == [0.0, 0.5, 0.5, 0.5, 0.5]
    storage.close(np.array([4, 2]))
    assert storage.free[: storage.num_free].tolist() == [4, 2]
    assert storage.live().tolist() == [1]
    assert storage.row_bytes == 24 + 8 + 4


def test_counts_stay_at_the_greatest() -> None:
    storage = RowStorage("t", {"deep": 1}, None, std=1.0, seed=0, rows=4)
    storage.used = 2
    storage.book["count"][1] = 2**32 - 2
    storage.touch(np.array([1, 1, 1]), 0, 1)
    assert storage.book["count"][1] == 2**32 - 1


@needs_proc
@pytest.mark.slow
def test_twenty_million_ids() -> None:
    """20 million ids at dim 8 with row-wise Adagrad: bytes as the documentation adds them up, the right rows, fit for 100 million."""
    import torch

    from ninerank.embedding.dynamic import DynamicTable, DynamicTableConfig, FusedRule, initial_values
    from ninerank.fusion.kernels.embedding_update import RowwiseAdagrad

    table = DynamicTable("item", {"deep": 8}, DynamicTableConfig(), seed=1, rule=FusedRule(RowwiseAdagrad(), 0.05))
    before, count, block = resident_bytes(), 20_000_000, 1_000_000
    ids = torch.arange(count) * 2_654_435_761 - (1 << 40)
    for step, part in enumerate(ids.split(block)):
        table.lookup(part, train=True, step=step)
        table.finish_step(step)
    figures = table.statistics()
    assert figures.size == figures.admitted == count
    row_bytes, slot_bytes = 24 + 8 * 4 + 4, 16 * 2**25
    assert figures.num_bytes < count * row_bytes + slot_bytes + 4096
    assert resident_bytes() - before < 1.1 * figures.num_bytes + ids.nbytes
    sample = ids[torch.randperm(count)[:100_000]]
    values = table.rows("deep", table.lookup(sample, train=False)).detach().numpy()
    assert (values == initial_values(sample.numpy(), 8, seed=1, group="deep", table="item", std=0.01)).all()
    assert not table.lookup(ids[:1000] + 1, train=False).any()
    hundred_million = 100_000_000 * row_bytes + 16 * 2**27
    assert hundred_million < 8.2e9 < 24 * 2**30
