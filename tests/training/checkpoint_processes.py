"""Processes that save and load together: `python checkpoint_processes.py RANK FOLDER`, four of them; RANK.json says how each case ended.

Every case has its own number of processes; those beyond it sit it out. What a case checks: blocks that were put together again equal the
same blocks cut from the whole, bit for bit.
"""

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from ninerank.embedding.dynamic import Always, BloomCounter, DynamicTable, DynamicTableConfig, Frequency, FusedRule, shard_of
from ninerank.embedding.dynamic.state import own_shard
from ninerank.embedding.shard import Shard
from ninerank.errors import CheckpointError
from ninerank.fusion.kernels.embedding_update import row_optimizers
from ninerank.training.checkpoint import BestWeights, ById, CheckpointStore, PerProcess, tensorfile

TABLES = {"a": (37, 6), "b": (10, 8), "c": (5, 4)}
PLANS = ("row", "column", "table", "grid")
ADMISSIONS = {
    "always": Always(),
    "frequency": Frequency(threshold=3),
    "bloom": Frequency(threshold=3, counter=BloomCounter(expected_ids=500, false_positive_rate=1e-3)),
}
Blocks = dict[str, list[Shard]]


def truth() -> dict[str, Tensor]:
    """Whole tensors: tables, Adagrad's sums of their shape, row-wise Adagrad's of one column."""
    draw = torch.Generator().manual_seed(7)
    found = {name: torch.randn(shape, generator=draw) for name, shape in TABLES.items()}
    found |= {f"{name}.sum": torch.rand(shape, generator=draw) for name, shape in TABLES.items()}
    return found | {f"{name}.rows": torch.rand(shape[0], 1, generator=draw) for name, shape in TABLES.items()}


def cuts(size: int, parts: int) -> list[tuple[int, int]]:
    edges = [size * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def boxes(plan: str, table: int, shape: tuple[int, int], rank: int, world_size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of a table that a process holds."""
    rows, columns = shape
    everything = slice(0, rows), slice(0, columns)
    if plan == "row":
        yield slice(*cuts(rows, world_size)[rank]), everything[1]
    elif plan == "column" and columns > 1:
        yield everything[0], slice(*cuts(columns, world_size)[rank])
    elif plan == "grid":  # every other block of a 3 x 2 board, so that a process holds several of one tensor
        board = [(slice(*row), slice(*column)) for row in cuts(rows, 3) for column in cuts(columns, min(2, columns))]
        yield from board[rank::world_size]
    elif rank == table % world_size:
        yield everything


def blocks(plan: str, rank: int, world_size: int, *, filled: bool) -> Blocks:
    """This process's blocks, as views of tensors that are larger, of the truth or of zeros."""
    found: Blocks = {}
    for i, (name, whole) in enumerate(truth().items()):
        source = whole if filled else torch.zeros_like(whole)
        found[name] = [
            Shard(tuple(whole.shape), (box[0].start, box[1].start), source[box]) for box in boxes(plan, i, whole.shape, rank, world_size)
        ]
    return {name: shards for name, shards in found.items() if shards}


def dynamic_table(admission: str) -> DynamicTable:
    rule = FusedRule(row_optimizers()["adagrad"](), 0.1)
    config = DynamicTableConfig(admission=ADMISSIONS[admission], reserve_rows=256, init_std=0.5)
    return DynamicTable("t", {"deep": 3, "linear": 1}, config, seed=1, rule=rule)


def trained(admission: str, rank: int, world_size: int) -> DynamicTable:
    """A table that saw the ids of one process."""
    table, draw = dynamic_table(admission), np.random.default_rng(3)
    for step in range(12):
        ids, weight = draw.integers(-30, 30, 40) * 2**57, torch.from_numpy(draw.standard_normal(40).astype(np.float32))
        own = shard_of(ids, world_size) == rank
        rows = table.lookup(torch.from_numpy(ids[own]), train=True, step=step)
        for group in table.dims:
            (table.rows(group, rows) * weight[torch.from_numpy(own), None]).sum().backward()
        table.update()
        table.finish_step(step)
    return table


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys(), (sorted(one), sorted(other))
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


class Cases:
    """What is run, by name, with the number of processes that run it."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.outcomes: dict[str, str] = {}
        self.count = 0

    def run(self, name: str, world_size: int, case: Callable[..., None], *arguments: Any, **options: Any) -> None:
        self.count += 1
        if self.rank >= world_size:
            return
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/meet-{self.count}",
            rank=self.rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        try:
            case(*arguments, **options)
            self.outcomes[name] = "ok"
        except Exception:  # noqa: BLE001  # the test says what failed
            self.outcomes[name] = traceback.format_exc()
        finally:
            distributed.destroy_process_group()

    def store(self, name: str, *, asynchronous: bool = True, digest: str = "d") -> CheckpointStore:
        return CheckpointStore(self.folder / name, keep_last=2, spec_digest=digest, asynchronous=asynchronous)

    def save(self, name: str, plan: str, world_size: int, *, asynchronous: bool) -> None:
        random = PerProcess({"cpu": torch.tensor([self.rank, world_size])})
        dynamic = {admission: ById(trained(admission, self.rank, world_size).state()) for admission in ADMISSIONS}
        held = blocks(plan, self.rank, world_size, filled=True)
        tower = {"w": torch.arange(5.0), "step": torch.tensor(3)}
        with self.store(name, asynchronous=asynchronous) as store:
            store.save(4, {"model": {"tower": tower, "tables": held}, "dynamic": dynamic, "random": random}, {"plan": plan})
            for shards in held.values():  # training goes on at once
                for shard in shards:
                    shard.tensor.fill_(-1.0)
            tower["w"].fill_(-1.0)
            if not asynchronous:
                assert store.names() == ["step-4"]

    def load(self, name: str, plan: str, world_size: int) -> None:
        checkpoint = self.store(name).load()
        assert checkpoint is not None
        held = blocks(plan, self.rank, world_size, filled=False)
        tower = {"w": torch.zeros(5), "step": torch.tensor(0)}
        checkpoint.read({"model": {"tower": tower, "tables": held}})
        assert_same(tower, {"w": torch.arange(5.0), "step": torch.tensor(3)})
        wanted = blocks(plan, self.rank, world_size, filled=True)
        assert held.keys() == wanted.keys()
        for table, shards in held.items():
            for shard, other in zip(shards, wanted[table], strict=True):
                assert torch.equal(shard.tensor, other.tensor), (table, shard.offsets)
        assert_same({key: value for key, value in checkpoint.section("model").items() if "tables" in key}, tables_named(truth()))
        own = checkpoint.own("random")
        if checkpoint.world_size == world_size:
            assert own is not None
            assert own["cpu"].tolist() == [self.rank, world_size]
        else:
            assert own is None

    def load_dynamic(self, name: str, world_size: int) -> None:
        checkpoint = self.store(name).load()
        assert checkpoint is not None
        for admission in ADMISSIONS:
            state = checkpoint.by_id(f"dynamic.{admission}")
            table = dynamic_table(admission)
            table.load_state(state)
            wanted = own_shard([trained(admission, 0, 1).state()], self.rank, world_size)
            got = table.state()
            if admission == "bloom":  # filters are added up: an upper bound, not the same bytes
                assert (got.pop("pending.counters") >= 0).all()
                wanted.pop("pending.counters")
            assert_same(got, wanted)
            assert len(got["id"]) > 5

    def best(self, world_size: int) -> None:
        best = BestWeights(self.folder / "best", spec_digest="d")
        for plan in ("row", "column"):
            best.save({"tables": blocks(plan, self.rank, world_size, filled=True)}, epoch=1)
        assert_same(dict(best.load()), tables_named(truth()))
        distributed.barrier()

    def full_disk(self) -> None:
        """One process cannot write: all hear of it, nothing is left of it, and the checkpoint before stays."""
        inner = tensorfile.os.fsync

        def fsync(descriptor: int) -> None:
            if self.rank == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            inner(descriptor)

        for asynchronous in (True, False):
            name = f"full-{asynchronous}"
            store = self.store(name, asynchronous=asynchronous)
            held = {"model": {"w": Shard((4, 1), (2 * self.rank, 0), torch.ones(2, 1))}}
            store.save(1, held, {})
            store.wait()
            tensorfile.os.fsync = fsync
            message = (
                r"step-2: cannot be written by process 1: \[Errno 28\] No space left on device; the newest one that was saved is step-1"
            )
            with pytest.raises(CheckpointError, match=message):  # noqa: PT012  # one or the other raises
                store.save(2, held, {})
                store.wait()
            tensorfile.os.fsync = inner
            distributed.barrier()
            assert [path.name for path in (self.folder / name).iterdir()] == ["step-1"]
            assert store.load() is not None
            store.save(3, held, {})
            store.wait()
            distributed.barrier()

    def damage(self) -> None:
        """A file that only one process reads is damaged: all hear of it."""
        store = self.store("row-2")
        store.load()
        distributed.barrier()
        for name, change in (("rank-1", "corrupt"), ("rank-0", "truncated"), ("rank-1", "missing")):
            path = self.folder / "row-2" / "step-4" / f"{name}.safetensors"
            if self.rank == 0:
                data = path.read_bytes()
                if change == "missing":
                    path.unlink()
                else:
                    path.write_bytes(data[:-1] if change == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
            distributed.barrier()
            with pytest.raises(CheckpointError, match=rf"{name}\.safetensors: .*{change}"):
                store.load()
            distributed.barrier()
            if self.rank == 0:
                path.write_bytes(data)
        distributed.barrier()
        assert store.load() is not None

    def disagree(self) -> None:
        """Blocks that do not fill a tensor, or overlap, are nobody's checkpoint."""
        store = self.store("wrong", asynchronous=False)
        for offset, shape in ((3, (6, 1)), (1, (4, 1))):
            with pytest.raises(ValueError, match=r"model\.w"):
                store.save(1, {"model": {"w": Shard(shape, (offset * self.rank, 0), torch.ones(2, 1))}}, {})
        assert not list((self.folder / "wrong").glob("*"))

    def lost(self) -> None:
        """A process is killed while both write: the other one says so, and the checkpoint before is whole."""
        store = self.store("lost")
        held = {"model": {"w": Shard((4, 1), (2 * self.rank, 0), torch.ones(2, 1))}}
        store.save(1, held, {})
        store.wait()
        if self.rank == 1:
            (self.folder / "1.json").write_text(json.dumps(self.outcomes))
            tensorfile.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        store.save(2, held, {})
        with pytest.raises(CheckpointError, match="step-2: cannot be written: another process is gone"):
            store.wait()
        assert store.names() == ["step-1"]


def tables_named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"tables.{name}": tensor for name, tensor in tensors.items()}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    cases = Cases(rank, folder)
    for world_size in (1, 2, 4):
        for plan in PLANS:
            name = f"{plan}-{world_size}"
            cases.run(f"save {name}", world_size, cases.save, name, plan, world_size, asynchronous=plan != "grid")
    for before, after in ((1, 2), (2, 1), (4, 2), (2, 4), (2, 2)):
        for plan in PLANS:
            for other in PLANS:
                cases.run(f"load {plan}-{before} as {other}-{after}", after, cases.load, f"{plan}-{before}", other, after)
        cases.run(f"dynamic {before}-{after}", after, cases.load_dynamic, f"row-{before}", after)
    cases.run("best", 2, cases.best, 2)
    cases.run("full disk", 2, cases.full_disk)
    cases.run("damage", 2, cases.damage)
    cases.run("disagree", 2, cases.disagree)
    (folder / f"{rank}.json").write_text(json.dumps(cases.outcomes))
    cases.run("lost", 2, cases.lost)
    (folder / f"{rank}.json").write_text(json.dumps(cases.outcomes))


if __name__ == "__main__":
    main()
