"""A tiered table against one that lies wholly in memory: hit rate, and ids trained per second.

Zipf(1.05) ids over a table of --rows rows whose device cache holds a tenth of them (--share), on the CPU: the cache is one array, the
backing store another, or a file. Each step looks up a batch of ids in two groups (dim 16 and dim 1), runs backward and updates with
row-wise Adagrad; between lookup and update a pass of dense work (--dense-ms of matrix products) stands for the model, since that is what
reading ahead hides behind. The steps are timed in turns after --warm-up steps that fill the cache. All tables see the same ids, and must
be equal, bit for bit, at the end.

    memory          all rows in one array
    host, ahead     rows in RAM, prefetch on            host, on demand     prefetch off
    disk, ahead     rows in a mapped file               disk, on demand

    cold                all pages of the file dropped from RAM before each step: what a file much larger than RAM costs. A step that
                        reads ahead ends when the background thread has done its work, too.

Before that: LFU's hit rate for several values of --decays, on ids whose popularity stays (`steady`) and on ids half of which are
renamed every 200 batches (`moving`).
"""

import argparse
import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harness import Result, Timing, interleave
from ninerank.embedding.table import TableGroup, TableLayout
from ninerank.embedding.tiers import TierConfig, TieredTable
from ninerank.embedding.tiers.slots import Slots
from ninerank.fusion.kernels.embedding_update import RowwiseAdagrad
from ninerank.fusion.lookup import LookupGrad, sequence

DIMS = {"deep": 16, "linear": 1}
LR, SEED = 0.05, 1
EXPONENT = 1.05
MOVE_EVERY = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--share", type=float, default=0.1, help="rows of the cache over rows of the table")
    parser.add_argument("--batch", type=int, default=16_384, help="ids of a step")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=60)
    parser.add_argument("--dense-ms", type=float, default=20.0)
    parser.add_argument("--decays", type=float, nargs="*", default=[1.0, 0.999, 0.99, 0.9])
    parser.add_argument("--directory", type=Path, default=None, help="of the file; a temporary one by default")
    options = parser.parse_args()
    cache_rows = int(options.rows * options.share)
    shapes = {"rows": options.rows, "cache_rows": cache_rows, "batch": options.batch, "dims": DIMS, "dense_ms": options.dense_ms}
    with Result("tiers", shapes=shapes) as result:
        for decay in options.decays:
            for kind, rates in hit_rates(options.rows, cache_rows, options.batch, decay).items():
                result.figure(f"hit_rate_{kind}_decay_{decay:g}", rates)
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            compare(result, options, cache_rows, directory)
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            for prefetch in (True, False):
                cold(result, options, cache_rows, directory, prefetch=prefetch)


class Ids:
    """Batches of Zipf ids; popularity is spread over the table by a permutation."""

    def __init__(self, num_rows: int, batch: int, seed: int = 0) -> None:
        self.rng, self.batch = np.random.default_rng(seed), batch
        self.cumulative = np.cumsum(np.arange(1, num_rows + 1) ** -EXPONENT)
        self.name = self.rng.permutation(num_rows)

    def draw(self) -> npt.NDArray[np.int64]:
        ranks = np.searchsorted(self.cumulative, self.rng.random(self.batch) * self.cumulative[-1])
        ids: npt.NDArray[np.int64] = self.name[ranks]
        return ids

    def move(self) -> None:
        """Give every second rank another id."""
        self.name[::2] = self.rng.permutation(self.name[::2])


def hit_rates(num_rows: int, cache_rows: int, batch: int, decay: float, steps: int = 600) -> dict[str, float]:
    """Share of each batch's distinct rows that the cache holds, over the second half of the steps."""
    rates = {}
    for kind in ("steady", "moving"):
        ids, slots, hits, total = Ids(num_rows, batch), Slots(cache_rows, decay), 0, 0
        for step in range(steps):
            if kind == "moving" and step % MOVE_EVERY == MOVE_EVERY - 1:
                ids.move()
            found = slots.find(ids.draw())
            victims = slots.victims(len(found.missing_M) - (slots.num_slots - slots.used))
            slots.count(np.concatenate([found.present_P, slots.assign(found.missing_M, victims)]))
            slots.age()
            if step >= steps // 2:
                hits, total = hits + len(found.present_P), total + found.num_distinct
        rates[kind] = hits / total
    return rates


class Memory:
    """The same table in ordinary storages."""

    def __init__(self, num_rows: int) -> None:
        layout, self.rule = TableLayout.of({"item": num_rows}), RowwiseAdagrad()
        self.values = {
            group: TableGroup.drawn(group, layout, dim, sparse=True, init_std=0.01, seed=SEED).storage.detach()
            for group, dim in DIMS.items()
        }
        self.states = {group: self.rule.new_state(values, torch.tensor([LR])) for group, values in self.values.items()}
        self.pending: dict[str, list[LookupGrad]] = {group: [] for group in DIMS}

    def prepare(self, ids: Tensor, *, step: int) -> Tensor:
        return ids

    def prefetch(self, ids: Tensor) -> None:
        """Everything is here."""

    def rows(self, group: str, row_N: Tensor) -> Tensor:
        return sequence(self.values[group].requires_grad_(), row_N, on_grad=self.pending[group].append)

    def update(self) -> None:
        for group, parts in self.pending.items():
            first_row_T, lr_T = torch.zeros(1, dtype=torch.int64), torch.tensor([LR])
            LookupGrad.merged(parts).apply(self.values[group].detach(), self.states[group], first_row_T, lr_T, self.rule)
            parts.clear()

    def finish_step(self, step: int) -> None:
        """Nothing is given up."""

    def state(self) -> dict[str, Tensor]:
        values = {f"value.{group}": tensor.detach() for group, tensor in self.values.items()}
        return values | {f"state.{group}.sum": state[0] for group, state in self.states.items()}


def trained(num_rows: int, config: TierConfig) -> TieredTable:
    """A tiered table that is ready to train."""
    table = TieredTable("item", num_rows, DIMS, config, seed=SEED)
    table.train_with(RowwiseAdagrad(), LR)
    return table


def compare(result: Result, options: argparse.Namespace, cache_rows: int, directory: str) -> None:
    """Time the steps of all tables in turns."""
    ids = Ids(options.rows, options.batch)
    batches = [torch.from_numpy(ids.draw()) for _ in range(options.warm_up + options.rounds + 1)]
    tables: dict[str, TieredTable | Memory] = {"memory": Memory(options.rows)}
    for placement in ("host", "disk"):
        for kind, prefetch in (("ahead", True), ("on_demand", False)):
            place = {"directory": f"{directory}/{kind}"} if placement == "disk" else {}
            config = TierConfig.parse({"placement": placement, "cache_rows": cache_rows, "prefetch": prefetch, **place}, "bench")
            start = time.perf_counter()
            tables[f"{placement}_{kind}"] = trained(options.rows, config)
            result.figure(f"{placement}_{kind}_start_s", time.perf_counter() - start)
    dense = dense_work(options.dense_ms)
    steps = {name: Steps(table, batches, dense) for name, table in tables.items()}
    times = interleave(steps, rounds=options.rounds, warmup=options.warm_up)
    for name, timing in times.items():
        result.figure(f"{name}_step_ms", timing.p50_ms)
        result.figure(f"{name}_thousand_ids_per_s", options.batch / timing.p50_ms)
    wanted = tables["memory"].state()
    for name, table in tables.items():
        if any(not torch.equal(tensor, wanted[key]) for key, tensor in table.state().items()):
            raise SystemExit(f"{name}: differs from the table in memory")
        if isinstance(table, TieredTable):
            result.ratio(f"{name}_vs_memory", times["memory"].p50_ms / times[name].p50_ms)
            figures = table.statistics()
            result.figure(f"{name}_hit_rate", figures.hit_rate)
            result.figure(f"{name}_prefetched_share", figures.prefetched / figures.misses)
            result.figure(f"{name}_read_mb_per_step", figures.bytes_read / len(batches) / 1e6)
            result.figure(f"{name}_written_mb_per_step", figures.bytes_written / len(batches) / 1e6)
            table.close()


def cold(result: Result, options: argparse.Namespace, cache_rows: int, directory: str, *, prefetch: bool) -> None:
    """Time steps whose rows must come from the disk, and whose evicted ones have no page in RAM either."""
    ids, rounds = Ids(options.rows, options.batch), options.rounds // 3
    batches = [torch.from_numpy(ids.draw()) for _ in range(options.warm_up + rounds + 1)]
    config = TierConfig(placement="disk", cache_rows=cache_rows, prefetch=prefetch, directory=directory)
    with trained(options.rows, config) as table:
        first = table.state()["value.deep"].data_ptr()
        num_bytes = sum(column.nbytes for column in table.state().values())
        step, seconds = Steps(table, batches, dense_work(options.dense_ms)), []
        for _ in range(options.warm_up):
            step()
        for _ in range(rounds):
            drop_pages(Path(directory) / "item.tier" / "rows.bin", first, num_bytes)
            start = time.perf_counter()
            step()
            table._cache.traffic._submit(lambda: None).result()
            seconds.append(time.perf_counter() - start)
    result.figure(f"cold_{'ahead' if prefetch else 'on_demand'}_step_ms", Timing.of(seconds).p50_ms)


def drop_pages(file: Path, address: int, num_bytes: int) -> None:
    """Write a mapped file to the disk and have the system forget its pages."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
        if ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), mmap.MADV_DONTNEED):
            raise SystemExit(f"{file}: its pages cannot be dropped")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def dense_work(milliseconds: float) -> Callable[[], object]:
    """Matrix products that take about as long."""
    matrix = torch.randn(384, 384)
    torch.mm(matrix, matrix)
    start = time.perf_counter()
    for _ in range(50):
        torch.mm(matrix, matrix)
    turns = int(milliseconds * 50 / ((time.perf_counter() - start) * 1e3))

    def work() -> None:
        for _ in range(turns):
            torch.mm(matrix, matrix)

    return work


class Steps:
    """Training step after training step of one table."""

    def __init__(self, table: "TieredTable | Memory", batches: list[Tensor], dense: Callable[[], object]) -> None:
        self.table, self.batches, self.dense, self.step = table, batches, dense, 0

    def __call__(self) -> None:
        table, step = self.table, self.step
        slots = table.prepare(self.batches[step], step=step)
        table.prefetch(self.batches[step + 1])
        loss = torch.stack([table.rows(group, slots).sum() for group in DIMS]).sum()
        self.dense()
        loss.backward()  # type: ignore[no-untyped-call]
        table.update()
        table.finish_step(step)
        self.step += 1


if __name__ == "__main__":
    main()
