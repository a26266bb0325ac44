"""Rows of a batch: int32 where that counts them; checked on the host, and on a device no question to it."""

from dataclasses import replace

import pytest
import torch

from ninerank.embedding.rows import KeyRows, SideRows
from ninerank.embedding.table import TableLayout
from ninerank.errors import DataError
from ninerank.features.batch import Block, KeyedJagged

META = torch.device("meta")


def ids(lengths: list[int], keys: tuple[str, ...]) -> KeyedJagged:
    return KeyedJagged(keys, torch.zeros(sum(lengths), dtype=torch.int64), torch.tensor(lengths), len(lengths) // len(keys))


@pytest.mark.parametrize(("num_rows", "dtype"), [(5, torch.int32), (2**31 - 1, torch.int32), (2**31, torch.int64), (0, torch.int64)])
def test_rows_are_int32_where_it_counts_them(num_rows: int, dtype: torch.dtype) -> None:
    rows = KeyRows(TableLayout.of({"item": num_rows}), {"recent": "item", "seen": "item"})
    host = ids([2, 0, 1, 3], ("recent", "seen"))
    single = KeyedJagged(host.keys, torch.zeros(4, dtype=torch.int64), None, 2)
    assert rows.single(single.to(META)).dtype is dtype
    assert rows.jagged(host.to(META)).dtype is dtype
    assert rows.single(single).dtype is dtype
    assert rows.jagged(host).dtype is dtype


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_a_lookup_on_the_host_checks_its_ids(bad: int) -> None:
    rows = KeyRows(TableLayout.of({"user": 3, "item": 5}), {"recent": "user", "seen": "item"})
    message = rf"feature 'seen': id {bad} is outside table 'item' of 5 rows \(valid: 0 to 4\)"
    held = ids([1, 0, 1, 2], ("recent", "seen"))
    assert rows.jagged(replace(held, values=torch.tensor([2, 0, 4, 1]))).tolist() == [2, 3, 7, 4]
    with pytest.raises(DataError, match=message):
        rows.jagged(replace(held, values=torch.tensor([2, 0, 4, bad])))
    single = KeyedJagged(("recent", "seen"), torch.tensor([0, 2, 4, 1]), None, 2)
    assert rows.single(single).tolist() == [[0, 2], [7, 4]]
    with pytest.raises(DataError, match=message):
        rows.single(replace(single, values=torch.tensor([0, 2, bad, 1])))


def test_a_device_is_never_asked_how_long_sequences_are() -> None:
    """Meta tensors have no values: whoever asks for one fails."""
    names = {"recent": "item", "seen": "item"}
    side = SideRows(TableLayout.of({"item": 5}), {}, {}, names, max_lengths=dict.fromkeys(names, 9))
    none = KeyedJagged((), torch.zeros(0, dtype=torch.int64), None, 2)
    block = Block(none, none, ids([2, 0, 1, 3], ("recent", "seen")), torch.zeros(2, 0))
    assert side.longest(block) == [2, 3]
    assert side.longest(block.to(META)) == [2, 3]
    assert block.sequences.measured().select(("seen",)).longest == (3,)
