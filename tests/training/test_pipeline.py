from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.errors import DataError
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.training.cache import PackedRows, batch_bytes
from ninerank.training.pipeline import Split, fit_spec, permutation
from ninerank.training.recipe import Recipe


def tensors(batch: Batch) -> dict[str, torch.Tensor | None]:
    found = {"label": batch.label_BT, "weight": batch.weight_B, "group": batch.group_B}
    for side, block in (("request", batch.request), ("item", batch.item)):
        found[f"{side}.dense"] = block.dense_RF
        for kind in ("single", "bags", "sequences"):
            ids = getattr(block, kind)
            found |= {f"{side}.{kind}.values": ids.values, f"{side}.{kind}.lengths": ids.lengths}
    return found


def assert_same(a: Batch, b: Batch) -> None:
    left, right = tensors(a), tensors(b)
    for key, value in left.items():
        other = right[key]
        assert (value is None) == (other is None), key
        if value is not None and other is not None:
            assert value.dtype == other.dtype, key
            assert torch.equal(value, other), key


def assert_same_epochs(a: Iterator[Batch], b: Iterator[Batch]) -> int:
    left, right = list(a), list(b)
    assert [batch.num_rows for batch in left] == [batch.num_rows for batch in right]
    for x, y in zip(left, right, strict=True):
        assert_same(x, y)
    return len(left)


@pytest.fixture
def open_split(make_recipe):
    def make(*overrides: str, name: str = "train", **kwargs: Any) -> Split:
        recipe: Recipe = make_recipe(*overrides)
        spec = fit_spec(recipe.spec, recipe.data.files("train"), recipe.data)
        embedding = EmbeddingCollection(spec, {"deep": 2}, EmbeddingConfig(), seed=0)
        return Split(recipe.data.files(name), recipe.data, spec, embedding=embedding, training=name == "train", seed=recipe.seed, **kwargs)

    return make


def test_rows_in_memory_and_rows_streamed_are_the_same_batches(open_split):
    memory, stream = open_split(), open_split("data.cache_bytes=0")
    assert (memory.in_memory, stream.in_memory) == (True, False)
    assert (memory.num_rows, memory.num_batches) == (stream.num_rows, stream.num_batches) == (700, 8)
    for epoch in range(3):
        assert assert_same_epochs(memory.epoch(epoch), stream.epoch(epoch)) == 8


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_an_epoch_can_be_entered_at_any_batch(open_split, cache_bytes):
    split = open_split(f"data.cache_bytes={cache_bytes}")
    whole = list(split.epoch(1))
    for start in (0, 3, 7, 8, 9):
        assert assert_same_epochs(iter(whole[start:]), split.epoch(1, start)) == max(0, 8 - start)


def test_epochs_differ_and_hold_every_row_once(open_split):
    split = open_split()
    order = [torch.cat([batch.weight_B for batch in split.epoch(epoch)]) for epoch in range(2)]
    assert not torch.equal(*order)
    assert torch.equal(order[0].sort().values, order[1].sort().values)


def test_without_shuffle_and_in_evaluation_rows_come_in_file_order(open_split, log_dir):
    for split, name in ((open_split("data.shuffle=false"), "train"), (open_split(name="valid"), "valid")):
        weight = parquet.read_table(log_dir / f"{name}.parquet")["weight"].to_numpy().astype(np.float32)
        np.testing.assert_array_equal(torch.cat([batch.weight_B for batch in split.epoch(5)]).numpy(), weight)


def real_weights(batch: Batch) -> torch.Tensor:
    return batch.weight_B[: batch.num_real_rows]


def test_processes_share_every_batch_of_rows_in_memory(open_split):
    whole = list(open_split("data.batch_size=98").epoch(2))
    parts = [list(open_split("data.batch_size=98", rank=rank, world_size=3).epoch(2)) for rank in range(3)]
    for batch, *own in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([real_weights(part) for part in own]), batch.weight_B)
        assert len({part.num_rows for part in own}) == 1
    last = [part[-1] for part in parts]
    assert [part.num_rows for part in last] == [5, 5, 5]  # the last 14 rows
    assert [part.padding for part in last] == [0, 0, 1]
    assert_same_epochs(iter(parts[1][4:]), open_split("data.batch_size=98", rank=1, world_size=3).epoch(2, 4))


def test_a_batch_of_fewer_rows_than_processes_repeats_its_last_row(open_split):
    parts = [list(open_split("data.batch_size=699", rank=rank, world_size=3).epoch(0))[-1] for rank in range(3)]
    assert [(part.num_rows, part.padding) for part in parts] == [(1, 0), (1, 1), (1, 1)]
    assert len({float(part.weight_B[0]) for part in parts}) == 1


@pytest.mark.parametrize(("size", "counts"), [(96, [32] * 7 + [10]), (3, [1] * 234), (233 * 3, [233, 1])])
def test_processes_read_their_own_rows_of_a_stream_in_batches_of_one_size(open_split, size, counts):
    overrides = ("data.cache_bytes=0", f"data.batch_size={size}")
    whole = torch.cat([batch.weight_B for batch in open_split(*overrides).epoch(2)])
    splits = [open_split(*overrides, rank=rank, world_size=3) for rank in range(3)]
    parts = [list(split.epoch(2)) for split in splits]
    assert [[batch.num_rows for batch in part] for part in parts] == [counts] * 3
    assert [split.num_batches for split in splits] == [len(counts)] * 3
    assert [sum(batch.num_real_rows for batch in part) for part in parts] == [233, 233, 234]
    assert torch.equal(torch.cat([real_weights(batch) for part in parts for batch in part]), whole)
    assert_same_epochs(iter(parts[0][-1:]), splits[0].epoch(2, len(counts) - 1))


@pytest.mark.parametrize(
    ("size", "drop_last", "expected"), [(233, False, [233, 233, 233, 1]), (233, True, [233] * 3), (96, True, [96] * 7), (700, True, [700])]
)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_the_last_batch(open_split, size, drop_last, expected, cache_bytes):
    split = open_split(f"data.batch_size={size}", f"data.drop_last={drop_last}", f"data.cache_bytes={cache_bytes}")
    assert [batch.num_rows for batch in split.epoch(0)] == expected
    assert split.num_batches == len(expected)


def test_evaluation_drops_nothing(open_split):
    assert [batch.num_rows for batch in open_split("data.batch_size=299", "data.drop_last=true", name="valid").epoch(0)] == [299, 1]


def test_too_few_rows_are_refused(open_split):
    with pytest.raises(DataError, match=r"train\.parquet: 700 rows make no batch; at least 701 are needed"):
        open_split("data.batch_size=701", "data.drop_last=true")


def test_fitting_can_be_limited_to_the_first_rows(make_recipe, log_dir):
    recipe: Recipe = make_recipe("data.fit_rows=10")
    seen: list[int] = []
    spec = fit_spec(recipe.spec, recipe.data.files("train"), recipe.data, seen.append)
    users = parquet.read_table(log_dir / "train.parquet")["user"].to_pylist()[:10]
    assert set(spec.feature("user").encoding.values) == set(users)
    assert sum(seen) == 10
    assert fit_spec(spec, recipe.data.files("train"), recipe.data) is spec


def test_permutation_is_pinned():
    assert permutation(8, 2021, 3).tolist() == [7, 1, 6, 2, 4, 0, 3, 5]


def jagged(keys: tuple[str, ...], lengths: list[int], start: int) -> KeyedJagged:
    return KeyedJagged(keys, torch.arange(start, start + sum(lengths)), torch.tensor(lengths, dtype=torch.int64), len(lengths) // len(keys))


@given(st.data())
def test_packing_and_taking_all_rows_gives_the_batches_back(data):
    batches = []
    for rows in data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)):
        lengths = st.lists(st.integers(0, 3), min_size=2 * rows, max_size=2 * rows)
        first_id = data.draw(st.sampled_from([0, 2**31 + 5, -(2**63), -(2**31) - 1, -3]))
        blocks = [
            Block(
                KeyedJagged(("a", "b"), torch.arange(2 * rows) + first_id, None, rows),
                jagged(("c", "d"), data.draw(lengths), 7),
                KeyedJagged((), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), rows),
                torch.arange(rows * 2, dtype=torch.float32).view(rows, 2),
            )
            for _ in range(2)
        ]
        batches.append(Batch(*blocks, label_BT=torch.ones(rows, 1), group_B=torch.arange(rows)))
    packed = PackedRows.of(batches)
    first = 0
    for batch in batches:
        assert_same(packed.take(torch.arange(first, first + batch.num_rows)), batch)
        first += batch.num_rows
    assert packed.num_rows == first
    everything = packed.take(torch.arange(first).flip(0))
    assert_same(PackedRows.of([everything]).take(torch.arange(first).flip(0)), packed.take(torch.arange(first)))


def test_packing_stops_at_its_bound(open_split):
    batches = list(open_split().epoch(0))
    size = sum(batch_bytes(batch) for batch in batches)
    assert PackedRows.within(batches, size - 1) is None
    packed = PackedRows.within(batches, size)
    assert packed is not None
    assert packed.num_bytes < size


def test_bad_rows_surface_with_file_and_row(make_recipe, tmp_path: Path, log_dir):
    table = parquet.read_table(log_dir / "train.parquet")
    click = table["click"].to_numpy().copy()
    click[333] = 2
    bad = table.set_column(0, "click", pa.array(click))
    parquet.write_table(bad, tmp_path / "bad.parquet")
    recipe: Recipe = make_recipe()
    spec = fit_spec(recipe.spec, recipe.data.files("train"), recipe.data)
    embedding = EmbeddingCollection(spec, {"deep": 2}, EmbeddingConfig(), seed=0)
    with pytest.raises(DataError, match=r"bad\.parquet.*'click'.*row 333.*2.*0 or 1"):
        Split((tmp_path / "bad.parquet",), recipe.data, spec, embedding=embedding, training=True, seed=0)
