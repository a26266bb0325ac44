"""Raw ids to rows: the id map against a Python dict, TorchRec's managed collision and search in a sorted array.

    insert   all ids into an empty structure, in one batch
    lookup   a batch of 26 x 4096 ids that are all known, uniform and Zipf(1.05)
    step     such a batch in training, 1% of it new ids: what is known is found, what is new gets a row
    table    a DynamicTable that grows to --table-rows ids at dim 8 with row-wise Adagrad: rates, longest pause, bytes per id

Rounds are interleaved, and before anything is timed all structures answer the same batch and must agree. TorchRec's module runs where
torchrec is installed; its table cannot grow, so it is given all the slots it will need.
"""

import argparse
import resource
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harness import Result, interleave
from ninerank.embedding.dynamic import DynamicTable, DynamicTableConfig, FusedRule, IdMap
from ninerank.fusion.kernels.embedding_update import RowwiseAdagrad

Ints = npt.NDArray[np.int64]

BATCH = 26 * 4096
NEW_SHARE = 0.01
TABLE_BATCH = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=2_000_000, help="distinct ids in every structure")
    parser.add_argument("--table-rows", type=int, default=20_000_000, help="ids that the table grows to; 0 leaves this part out")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    shapes = {"ids": options.ids, "batch": BATCH, "new_share": NEW_SHARE, "table_rows": options.table_rows, "table_dim": 8}
    with Result("dynamic", shapes=shapes) as result:
        compare(result, options.ids, options.rounds)
        if options.table_rows:
            grow(result, options.table_rows)


def compare(result: Result, count: int, rounds: int) -> None:
    """Insert, lookup and step of all structures."""
    rng = np.random.default_rng(0)
    ids = np.unique(rng.integers(0, 2**63 - 2, count + count // 8))
    ids, news = np.split(rng.permutation(ids)[: count + count // 16], [count])
    kinds: dict[str, type[Structure]] = {"ours": Ours, "dict": Dict, "sorted": Sorted}
    if find_spec("torchrec") is not None:
        kinds["torchrec"] = TorchRec
    structures = {name: kind(count + len(news)) for name, kind in kinds.items()}
    for structure in structures.values():
        structure.insert(ids)
    uniform = rng.choice(ids, BATCH)
    zipf = ids[zipf_ranks(rng, count)]
    for structure in structures.values():
        check(structure, ids, uniform, news)

    def each(work: Callable[[Any], object]) -> dict[str, Callable[[], object]]:
        return {name: lambda structure=structure: work(structure) for name, structure in structures.items()}  # type: ignore[misc]

    def record(what: str, calls: Mapping[str, Callable[[], object]], size: int, turns: int, warmup: int = 1) -> None:
        times = interleave(calls, rounds=turns, warmup=warmup)
        for name, timing in times.items():
            result.figure(f"{what}_{name}_million_ids_per_s", size / timing.p50_ms / 1e3)
        for name, timing in times.items():
            if name != "ours":
                result.ratio(f"{what}_vs_{name}", timing.p50_ms / times["ours"].p50_ms)

    fresh = {name: (lambda kind=kind: kind(count).insert(ids)) for name, kind in kinds.items()}
    record("insert", fresh, count, max(3, rounds // 4))
    record("lookup_uniform", each(lambda structure: structure.lookup(uniform)), BATCH, rounds)
    record("lookup_zipf", each(lambda structure: structure.lookup(zipf)), BATCH, rounds)
    turns = min(rounds, len(news) // int(BATCH * NEW_SHARE) - 2)
    batches = {name: iter(step_batches(ids, news, turns + 1)) for name in structures}
    record("step", {name: lambda n=name, s=s: s.step(next(batches[n])) for name, s in structures.items()}, BATCH, turns)  # type: ignore[misc]


def zipf_ranks(rng: np.random.Generator, count: int) -> Ints:
    """A batch of ranks below `count`, rank r with a probability that falls as (r + 1)^-1.05."""
    cumulative = np.cumsum(np.arange(1, count + 1) ** -1.05)
    ranks: Ints = np.searchsorted(cumulative, rng.random(BATCH) * cumulative[-1])
    return ranks


def step_batches(ids: Ints, news: Ints, count: int) -> list[Ints]:
    """Batches of known ids, a share of each never seen before."""
    rng, fresh = np.random.default_rng(1), int(BATCH * NEW_SHARE)
    return [rng.permutation(np.concatenate([rng.choice(ids, BATCH - fresh), part])) for part in np.split(news[: count * fresh], count)]


def check(structure: "Structure", ids: Ints, batch: Ints, news: Ints) -> None:
    """Each id has a row of its own, the same in every answer, and unknown ids have none."""
    rows = structure.lookup(ids)
    if len(np.unique(rows)) != len(ids) or structure.is_missing(rows).any():
        raise SystemExit(f"{type(structure).__name__}: {len(ids)} ids have {len(np.unique(rows))} rows")
    order = np.argsort(ids)
    if (rows[order[np.searchsorted(ids[order], batch)]] != structure.lookup(batch)).any():
        raise SystemExit(f"{type(structure).__name__}: an id has two rows")
    if not structure.is_missing(structure.lookup(news[:1000])).all():
        raise SystemExit(f"{type(structure).__name__}: an unknown id has a row")


class Structure:
    """Ids to rows: 1, 2, 3 ... in the order of insertion, 0 for unknown ids."""

    def __init__(self, capacity: int) -> None: ...

    def insert(self, ids: Ints) -> None:
        """Give rows to distinct ids."""
        raise AssertionError("each structure has its own")

    def lookup(self, ids: Ints) -> Ints:
        """Row of each id."""
        raise AssertionError("each structure has its own")

    def step(self, ids: Ints) -> Ints:
        """Row of each id, new ids get one."""
        raise AssertionError("each structure has its own")

    def is_missing(self, rows: Ints) -> npt.NDArray[np.bool_]:
        return np.equal(rows, 0)


class Ours(Structure):
    def __init__(self, capacity: int) -> None:
        self.map = IdMap()

    def insert(self, ids: Ints) -> None:
        self.map.put(ids, np.arange(1, len(ids) + 1))

    def lookup(self, ids: Ints) -> Ints:
        return self.map.find(ids)

    def step(self, ids: Ints) -> Ints:
        rows = self.map.find(ids)
        news = np.unique(ids[rows == 0])
        self.map.put(news, np.arange(len(self.map) + 1, len(self.map) + 1 + len(news)))
        rows[rows == 0] = self.map.find(ids[rows == 0])
        return rows


class Dict(Structure):
    def __init__(self, capacity: int) -> None:
        self.rows: dict[int, int] = {}

    def insert(self, ids: Ints) -> None:
        self.rows.update(zip(ids.tolist(), range(1, len(ids) + 1), strict=True))

    def lookup(self, ids: Ints) -> Ints:
        get = self.rows.get
        return np.array([get(word, 0) for word in ids.tolist()], np.int64)

    def step(self, ids: Ints) -> Ints:
        rows = self.rows
        return np.array([rows.setdefault(word, len(rows) + 1) for word in ids.tolist()], np.int64)


class Sorted(Structure):
    """numpy.searchsorted; new ids are merged into the array."""

    def __init__(self, capacity: int) -> None:
        self.ids, self.rows = np.empty((2, 0), np.int64)

    def insert(self, ids: Ints) -> None:
        order = np.argsort(ids)
        self.ids, self.rows = ids[order], order + 1

    def lookup(self, ids: Ints) -> Ints:
        place = np.searchsorted(self.ids, ids)
        place[place == len(self.ids)] = 0
        return np.where(self.ids[place] == ids, self.rows[place], 0)

    def step(self, ids: Ints) -> Ints:
        news = np.unique(ids[self.lookup(ids) == 0])
        place = np.searchsorted(self.ids, news)
        rows = np.arange(len(self.ids) + 1, len(self.ids) + 1 + len(news))
        self.ids, self.rows = np.insert(self.ids, place, news), np.insert(self.rows, place, rows)
        return self.lookup(ids)


class TorchRec(Structure):
    """MCHManagedCollisionModule with LFU eviction after every batch: ids it has not met read the last slot."""

    def __init__(self, capacity: int) -> None:
        from torchrec.modules.mc_modules import LFU_EvictionPolicy, MCHManagedCollisionModule

        self.last = capacity
        policy = LFU_EvictionPolicy()
        self.module = MCHManagedCollisionModule(
            zch_size=capacity + 1, device=torch.device("cpu"), eviction_policy=policy, eviction_interval=1
        )

    def insert(self, ids: Ints) -> None:
        self.module.train()
        self.module.profile(self.features(ids))

    def lookup(self, ids: Ints) -> Ints:
        return self.module.remap(self.features(ids))["ids"].values().numpy()  # type: ignore[no-any-return]

    def step(self, ids: Ints) -> Ints:
        self.module.train()
        self.module.profile(self.features(ids))
        return self.lookup(ids)

    def is_missing(self, rows: Ints) -> npt.NDArray[np.bool_]:
        return np.equal(rows, self.last)

    @staticmethod
    def features(ids: Ints) -> dict[str, Any]:
        from torchrec.sparse.jagged_tensor import JaggedTensor

        return {"ids": JaggedTensor(values=torch.from_numpy(ids.copy()), lengths=torch.ones(len(ids), dtype=torch.int32))}


def grow(result: Result, count: int) -> None:
    """A table from nothing to `count` ids, a million at a time; then lookups, and training steps on known ids."""
    config = DynamicTableConfig(reserve_rows=count + 1)
    table = DynamicTable("item", {"deep": 8}, config, seed=1, rule=FusedRule(RowwiseAdagrad(), 0.05))
    table.lookup(torch.arange(1000), train=True, step=0)  # compiles
    table.load_state({name: value[:0] for name, value in table.state().items()})
    before, rng = resident_bytes(), np.random.default_rng(2)
    pauses, ids = [], torch.from_numpy(rng.permutation(np.arange(count)) * 2_654_435_761)
    for step, part in enumerate(torch.split(ids, TABLE_BATCH)):
        start = time.perf_counter()
        table.lookup(part, train=True, step=step)
        pauses.append(time.perf_counter() - start)
        table.finish_step(step)
    result.figure("table_insert_million_ids_per_s", count / sum(pauses) / 1e6)
    result.figure("table_longest_pause_s", max(pauses))
    result.figure("table_bytes_per_id", table.statistics().num_bytes / count)
    result.figure("table_resident_bytes_per_id", (resident_bytes() - before - ids.nbytes) / count)
    result.figure("table_peak_resident_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    step = count
    for name, batch in {"uniform": rng.integers(0, count, BATCH), "zipf": zipf_ranks(rng, count)}.items():
        known = ids[torch.from_numpy(batch)]

        def read(known: torch.Tensor = known) -> None:
            with torch.no_grad():
                table.rows("deep", table.lookup(known, train=False))

        def train(known: torch.Tensor = known) -> None:
            nonlocal step
            step += 1
            table.rows("deep", table.lookup(known, train=True, step=step)).sum().backward()  # type: ignore[no-untyped-call]
            table.update()
            table.finish_step(step)

        calls = {"find": lambda known=known: table.lookup(known, train=False), "read": read, "train": train}
        for kind, timing in interleave(calls, rounds=10).items():
            result.figure(f"table_{kind}_{name}_million_ids_per_s", BATCH / timing.p50_ms / 1e3)


def resident_bytes() -> int:
    """Memory that this process holds now; 0 where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main()
