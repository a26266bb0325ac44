"""What one process of the tests of dealt tables does: the model of `sharding_job` with raw ids or tiers, over several processes and in one.

usage: dynamic_job.py RANK WORLD_SIZE PORT OUT.json JOB [ARGUMENT ...]
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sharding_job import GROUPS, ROWS, STEPS, Tower, batches, config_of, gathered, largest, part, run, spec, train
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.dynamic.state import reshard, shard_of
from ninerank.embedding.optimizer import SparseOptimizer
from ninerank.embedding.shard import Shard
from ninerank.embedding.sharding import Machine, ShardedEmbeddingCollection, ShardedOptimizer, ShardingConfig, row_bytes
from ninerank.embedding.sharding.exchange import swap
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import MISSING_ID, Dynamic, FeatureSpec, IdFeature

ALL = ("user", "city", "tag", "item")
SOME = ("tag", "item")
POLICIES: dict[str, dict[str, Any]] = {
    "always": {},
    "admitted": {
        "tag": {"admission": {"kind": "probability", "probability": 0.3}},
        "item": {"admission": {"kind": "frequency", "threshold": 4, "halve_every": 7}},
    },
    "evicted": {
        "tag": {"eviction": [{"kind": "least_frequent", "min_count": 1000, "max_age": 0}], "evict_every": 2},
        "item": {
            "admission": {"kind": "frequency", "threshold": 2},
            "eviction": [{"kind": "last_seen", "max_age": 2}, {"kind": "capacity", "max_rows": 30, "by": "lfu", "fill": 0.8}],
            "evict_every": 4,
        },
    },
}
# What belongs to a process's own map and memory.
OWN_FIGURES = ("num_slots", "load_factor", "num_bytes")


def dynamic_spec(tables: tuple[str, ...]) -> FeatureSpec:
    features = tuple(
        f.model_copy(update={"encoding": Dynamic()}) if isinstance(f, IdFeature) and f.table_name in tables else f for f in spec().features
    )
    return spec().model_copy(update={"features": features})


def raw(fitted: FeatureSpec, batch: Batch) -> Batch:
    """The batch with raw ids for dynamic tables, row 0 as missing."""

    def turned(ids: KeyedJagged) -> KeyedJagged:
        values, spans = ids.values.clone(), ids.spans()
        for key in ids.keys:
            if fitted.tables[str(fitted.table_of(key))].is_dynamic:
                own = values[spans[key]]
                values[spans[key]] = torch.where(own == 0, MISSING_ID, 2**62 - 977 * own)
        return replace(ids, values=values)

    def block(whole: Block) -> Block:
        return replace(whole, single=turned(whole.single), bags=turned(whole.bags), sequences=turned(whole.sequences))

    return replace(batch, request=block(batch.request), item=block(batch.item))


def data(fitted: FeatureSpec, steps: int = STEPS) -> list[Batch]:
    return [raw(fitted, batch) for batch in batches(spec(), steps)]


def config(policy: str, tables: tuple[str, ...], **settings: Any) -> EmbeddingConfig:
    own = {name: value for name, value in POLICIES[policy].items() if name in tables}
    return EmbeddingConfig.parse({"init_std": 0.3, "dynamic": {"reserve_rows": 256}, "tables": own, **settings}, "embedding")


def alone(rule: str, policy: str, tables: tuple[str, ...], clip: float | None, steps: int = STEPS) -> tuple[EmbeddingCollection, Any]:
    fitted = dynamic_spec(tables)
    collection = EmbeddingCollection(fitted, GROUPS, config(policy, tables), seed=3)
    found = train(collection, Tower(len(collection.keys)), SparseOptimizer(collection, config_of(rule)), data(fitted, steps), clip)
    return collection, found


def sharded(
    rule: str, policy: str, tables: tuple[str, ...], tiers: dict[str, Any] | None = None, **sharding: Any
) -> tuple[ShardedEmbeddingCollection, ShardedOptimizer, FeatureSpec]:
    world_size, fitted, optimizer = dist.get_world_size(), dynamic_spec(tables), config_of(rule)
    collection = ShardedEmbeddingCollection(
        fitted,
        GROUPS,
        config(policy, tables, tiers=tiers or {}),
        seed=3,
        sharding=ShardingConfig.parse(sharding, "sharding"),
        machine=Machine("cpu", world_size, world_size, 1 << 28),
        device=torch.device("cpu"),
        batch_size=ROWS // world_size,
        row_bytes=row_bytes(optimizer.rule, GROUPS),
    )
    return collection, ShardedOptimizer(collection, optimizer), fitted


def together(
    rule: str, policy: str, tables: tuple[str, ...], clip: float | None, steps: int = STEPS, **sharding: Any
) -> tuple[ShardedEmbeddingCollection, Any]:
    collection, optimizer, fitted = sharded(rule, policy, tables, **sharding)
    tower = DistributedDataParallel(Tower(len(collection.keys)))
    return collection, train(collection, tower, optimizer, own_part(data(fitted, steps)), clip)


def own_part(whole: list[Batch]) -> list[Batch]:
    return [part(batch, dist.get_rank(), dist.get_world_size()) for batch in whole]


def whole_state(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of a table whose parts all processes hold; each holds its own ids."""
    assert bool((shard_of(own["id"].numpy(), dist.get_world_size()) == dist.get_rank()).all())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return reshard(everyone, 1)[0]


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of values and optimizer state; nan where ids, counts or ages are others."""
    if ours.keys() != theirs.keys() or any(ours[key].shape != theirs[key].shape for key in ours):
        return float("nan")
    worst = 0.0
    for key, value in theirs.items():
        if key.startswith(("value.", "state.")):
            worst = max(worst, float((ours[key] - value).abs().max() / value.abs().max().clamp(min=1e-6)))
        elif not torch.equal(ours[key], value):
            return float("nan")
    return worst


def relative(ours: list[float], theirs: list[float]) -> float:
    return max((abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def against_one(rule: str, policy: str, tables: tuple[str, ...]) -> dict[str, Any]:
    """Several processes against one: course, tables and their figures."""
    clip = 0.05 if rule in {"sgd", "adam"} else None
    one, expected = alone(rule, policy, tables, clip)
    many, met = together(rule, policy, tables, clip)
    figures, wanted = many.table_metrics(), one.table_metrics()
    return {
        "loss": relative(met["losses"], expected["losses"]),
        "norm": relative(met["norms"], expected["norms"]),
        "tables": max(difference(whole_state(many.managed[name].state()), one.managed[name].state()) for name in tables),
        "figures": {key: [figures[key], value] for key, value in wanted.items() if not key.endswith(OWN_FIGURES)},
        "parameters": [many.num_values, one.num_values],
        "kinds": sorted({placed.kind for placed in many.plan.placed}),
    }


def pair(folder: str) -> dict[str, Any]:
    """A few of all cases, for every run of the tests; folder: for tables on disk."""
    found = {f"{rule} always": against_one(rule, "always", SOME) for rule in ("rowwise_adagrad", "adam")}
    found["adagrad admitted"] = against_one("adagrad", "admitted", ALL)
    found["ftrl evicted"] = against_one("ftrl", "evicted", ALL)
    found["wires"] = {wire: together("sgd", "always", ALL, None, 20, quantised_comms=wire)[1]["losses"] for wire in ("none", "bf16")}
    found["rounded"] = rounded()
    found["tiered"] = {rule: tiered(rule, f"{folder}/{rule}") for rule in ("rowwise_adagrad",)}
    return {**found, "misuse": misuse(), "accumulated": accumulated()}


def every() -> dict[str, Any]:
    """All cases."""
    rules = ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")
    places = {"all": ALL, "some": SOME}
    return {
        f"{rule} {policy} {name}": against_one(rule, policy, own) for rule in rules for policy in POLICIES for name, own in places.items()
    }


def accumulated() -> dict[str, Any]:
    """Two batches, one step: gradients of the first wait with the owners; an evaluation between steps changes nothing."""

    def course(embedding: EmbeddingCollection, optimizer: Any, own: list[Batch]) -> float:
        tower = Tower(len(embedding.keys))
        scale = dist.get_world_size() if isinstance(embedding, ShardedEmbeddingCollection) else 1
        for step in range(4):
            with torch.no_grad():
                embedding(own[step + 1])
            optimizer.zero_grad()
            for batch in own[2 * step : 2 * step + 2]:
                (tower(embedding(embedding.prepare(batch, step=step))).square().sum() * scale).backward()
            optimizer.step()
            embedding.finish_step(step)
        with torch.no_grad():
            total = tower(embedding(own[0])).sum()
        if scale > 1:
            dist.all_reduce(total)
        return float(total)

    collection, optimizer, fitted = sharded("adagrad", "always", ALL)
    own = own_part(data(fitted, 8))
    met = course(collection, optimizer, own)
    one = EmbeddingCollection(fitted, GROUPS, config("always", ALL), seed=3)
    return {"loss": relative([met], [course(one, SparseOptimizer(one, config_of("adagrad")), data(fitted, 8))])}


def tiered(rule: str, folder: str) -> dict[str, Any]:
    """Tables of which the device holds few rows, on the host and on disk, beside a dynamic one, against tables in memory."""
    clip = 0.05 if rule in {"sgd", "adam"} else None
    tiers = {"item": {"cache_rows": 40}, "user": {"cache_rows": 12, "placement": "disk", "directory": folder}}
    one, expected = alone(rule, "always", ("tag",), clip)
    collection, optimizer, fitted = sharded(rule, "always", ("tag",), tiers=tiers)
    tower = DistributedDataParallel(Tower(len(collection.keys)))
    met = train(collection, tower, optimizer, own_part(data(fitted)), clip)
    shards = {key: value for key, value in collection.static_state().items() if isinstance(value, Shard)}
    values = {key.removeprefix("embedding."): value for key, value in one.state_dict().items() if "managed" not in key}
    found = {
        "loss": relative(met["losses"], expected["losses"]),
        "norm": relative(met["norms"], expected["norms"]),
        "values": largest(gathered(shards), values),
        "evictions": collection.table_metrics()["table.user.evictions"],
        "parameters": [collection.num_values, one.num_values],
    }
    collection.close()
    return found


def rounded() -> dict[str, float]:
    """Greatest relative error of a value that travels in 16 bits, over the range that fp16 holds with all of its bits."""
    size_WT = torch.full((dist.get_world_size(), 1), 50)
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(dist.get_rank())).exp()
    exact = swap(rows, size_WT, size_WT)
    wires = {"fp16": torch.float16, "bf16": torch.bfloat16}
    return {name: float(((swap(rows, size_WT, size_WT, wire) - exact) / exact).abs().max()) for name, wire in wires.items()}


def misuse() -> dict[str, str]:
    """What is said of batches that are looked up out of turn, and of gradients that are left."""

    def message(act: Callable[[], object]) -> str:
        try:
            act()
        except RuntimeError as error:
            return str(error)
        return "nothing was refused"

    collection, optimizer, fitted = sharded("sgd", "always", ALL)
    first, second = own_part(data(fitted, 2))
    before, after = collection.prepare(first, step=0), collection.prepare(second, step=0)
    found = {"old batch": message(lambda: collection(before))}
    loss = collection(after)["deep"].sum()
    loss.backward()
    found["left"] = message(lambda: collection.finish_step(0))
    optimizer.step()
    optimizer.zero_grad()
    loss = collection(after)["deep"].sum()
    collection.finish_step(0)
    found["late"] = message(loss.backward)
    return found


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"pair": pair, "every": every}

if __name__ == "__main__":
    run(JOBS)
