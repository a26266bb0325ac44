"""What one process of the sharding tests does: train a small model by several sharding kinds and optimizers, and say what came out.

usage: sharding_job.py RANK WORLD_SIZE PORT OUT.json JOB [ARGUMENT ...]
"""

import json
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.optimizer import SparseOptimizer, SparseOptimizerConfig, clip_grad_norm_
from ninerank.embedding.sharding import Machine, ShardedEmbeddingCollection, ShardedOptimizer, ShardingConfig, row_bytes
from ninerank.errors import NinerankError
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import FeatureSpec, Hashed, IdFeature, SequenceFeature
from ninerank.fusion.kernels import registry

GROUPS = {"deep": 8, "linear": 1}
ROWS = 12
STEPS = 50
RULES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.5, "weight_decay": 0.01},
    "adagrad": {"lr": 0.2},
    "rowwise_adagrad": {"lr": 0.2, "weight_decay": 0.01, "max_gradient": 0.05, "max_row_norm": 0.02},
    "adam": {"lr": 0.02, "max_row_norm": 0.02},
    "ftrl": {"lr": 0.2, "l1": 1e-4},
}
# What FBGEMM has too.
PLAIN: dict[str, dict[str, Any]] = {
    "plain sgd": {"kind": "sgd", "lr": 0.5, "table_lr": {}},
    "plain adagrad": {"kind": "adagrad", "lr": 0.2, "eps": 1e-6, "initial_accumulator": 0.1, "table_lr": {}},
    "plain rowwise_adagrad": {"kind": "rowwise_adagrad", "lr": 0.2, "table_lr": {}},
}
KINDS: dict[str, dict[str, Any]] = {
    "table_wise": {"default": "table_wise"},
    "row_wise": {"default": "row_wise"},
    "column_wise": {"default": "column_wise"},
    "data_parallel": {"default": "data_parallel"},
    "mixed": {"default": "auto", "tables": {"item": "row_wise", "user": "column_wise", "tag": "data_parallel"}},
}


def spec() -> FeatureSpec:
    """Single ids, bags by mean and by sum, a sequence, and two tables that several features share."""
    return FeatureSpec(
        labels=("click",),
        features=(
            IdFeature(name="user", role="user", encoding=Hashed(num_buckets=36)),
            IdFeature(name="city", role="context", encoding=Hashed(num_buckets=1)),
            IdFeature(name="likes", role="user", encoding=Hashed(num_buckets=20), table="tag", multi=True, pooling="mean"),
            IdFeature(name="recent", role="user", encoding=Hashed(num_buckets=52), table="item", multi=True, pooling="sum"),
            SequenceFeature(name="history", role="user", of="item", max_length=6),
            IdFeature(name="item", role="item", encoding=Hashed(num_buckets=52)),
            IdFeature(name="tags", role="item", encoding=Hashed(num_buckets=20), table="tag", multi=True, pooling="sum"),
        ),
    )


def batches(fitted: FeatureSpec, count: int = STEPS, rows: int = ROWS) -> list[Batch]:
    """Random batches of few ids, so that rows repeat within a batch and over processes; labels follow the ids."""
    draw = np.random.default_rng(7)

    def single(keys: tuple[str, ...]) -> KeyedJagged:
        values = [draw.integers(0, fitted.tables[str(fitted.table_of(key))].num_rows, rows) for key in keys]
        return KeyedJagged(keys, torch.from_numpy(np.concatenate([np.empty(0, np.int64), *values])), None, rows)

    def several(keys: tuple[str, ...], most: int) -> KeyedJagged:
        lengths = draw.integers(0, most + 1, (len(keys), rows))
        values = [draw.integers(0, fitted.tables[str(fitted.table_of(key))].num_rows, lengths[i].sum()) for i, key in enumerate(keys)]
        joined = np.concatenate([np.empty(0, np.int64), *values])
        return KeyedJagged(keys, torch.from_numpy(joined), torch.from_numpy(lengths.reshape(-1)), rows)

    def block(side: Any) -> Block:
        dense_RF = torch.from_numpy(draw.standard_normal((rows, 1 if side == "item" else 0)).astype(np.float32))
        return Block(single(fitted.single_keys(side)), several(fitted.bag_keys(side), 4), several(fitted.sequence_keys(side), 6), dense_RF)

    made = []
    for _ in range(count):
        request, item = block("request"), block("item")
        label_BT = ((request.single.values[:rows] + item.single.values[:rows]) % 3 == 0).float()[:, None]
        made.append(Batch(request, item, label_BT=label_BT))
    return made


def part(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows of one process."""
    size = batch.num_rows // world_size
    own = slice(rank * size, (rank + 1) * size)

    def ids(all_ids: KeyedJagged) -> KeyedJagged:
        found = [jagged for _, jagged in all_ids.items()]
        values = [j.values[int(j.offsets[own.start]) : int(j.offsets[own.stop])] for j in found]
        lengths = [j.lengths[own] for j in found]
        empty = torch.empty(0, dtype=torch.int64)
        return KeyedJagged(
            all_ids.keys, torch.cat([empty, *values]), None if all_ids.lengths is None else torch.cat([empty, *lengths]), size
        )

    def block(whole: Block) -> Block:
        return Block(ids(whole.single), ids(whole.bags), ids(whole.sequences), whole.dense_RF[own])

    assert batch.label_BT is not None
    return Batch(block(batch.request), block(batch.item), label_BT=batch.label_BT[own])


class Tower(nn.Module):
    """Fields, a history pooled by attention to nothing but its mask, a dense number."""

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.hidden = nn.Parameter(torch.randn((num_fields + 1) * GROUPS["deep"] + 1, 16, generator=generator) * 0.3)
        self.out = nn.Parameter(torch.randn(16, 1, generator=generator) * 0.3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        history_BD = (inputs["deep.seq.history"] * inputs["mask.history"][..., None]).sum(1)
        hidden = torch.tanh(torch.cat([inputs["deep"].flatten(1), history_BD, inputs["dense"]], dim=1) @ self.hidden)
        return hidden @ self.out + inputs["linear"].sum(1) + inputs["linear.seq.history"].sum(1)


def train(embedding: EmbeddingCollection, tower: nn.Module, optimizer: Any, parts: list[Batch], clip: float | None) -> dict[str, Any]:
    """Losses of the global batch, and gradient norms."""
    world_size = dist.get_world_size() if isinstance(embedding, ShardedEmbeddingCollection) else 1
    dense = torch.optim.SGD(tower.parameters(), lr=0.1)
    losses, norms = [], []
    for step, part_of_batch in enumerate(parts):
        batch = embedding.prepare(part_of_batch, step=step)
        logits_BT = tower(embedding(batch))
        own = nn.functional.binary_cross_entropy_with_logits(logits_BT, batch.label_BT, reduction="sum") / ROWS
        dense.zero_grad()
        optimizer.zero_grad()
        (own * world_size).backward()
        if clip is not None:
            norms.append(float(clip_grad_norm_(list(tower.parameters()), optimizer, clip)))
        dense.step()
        optimizer.step()
        embedding.finish_step(step)
        total = own.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return {"losses": losses, "norms": norms}


def config_of(rule: str) -> SparseOptimizerConfig:
    return SparseOptimizerConfig.parse({"kind": rule, "table_lr": {"item": 0.05}, **{**RULES, **PLAIN}[rule]}, "sparse")


def one_process(rule: str, clip: float | None, steps: int = STEPS) -> tuple[EmbeddingCollection, SparseOptimizer, dict[str, Any]]:
    collection = EmbeddingCollection(spec(), GROUPS, EmbeddingConfig(init_std=0.3), seed=3)
    optimizer = SparseOptimizer(collection, config_of(rule))
    found = train(collection, Tower(len(collection.static.keys)), optimizer, batches(spec(), steps), clip)
    return collection, optimizer, found


def sharded(rule: str, sharding: dict[str, Any], groups: dict[str, int] = GROUPS) -> tuple[ShardedEmbeddingCollection, ShardedOptimizer]:
    world_size, config = dist.get_world_size(), config_of(rule)
    collection = ShardedEmbeddingCollection(
        spec(),
        groups,
        EmbeddingConfig(init_std=0.3),
        seed=3,
        sharding=ShardingConfig.parse(sharding, "sharding"),
        machine=Machine("cpu", world_size, world_size, sharding.get("memory_bytes", 1 << 28)),
        device=torch.device("cpu"),
        batch_size=ROWS // world_size,
        row_bytes=row_bytes(config.rule, groups),
    )
    return collection, ShardedOptimizer(collection, config)


def many_processes(
    rule: str, sharding: dict[str, Any], clip: float | None, steps: int = STEPS
) -> tuple[ShardedEmbeddingCollection, ShardedOptimizer, dict[str, Any]]:
    collection, optimizer = sharded(rule, sharding)
    tower = DistributedDataParallel(Tower(len(collection.keys)))
    parts = [part(batch, dist.get_rank(), dist.get_world_size()) for batch in batches(spec(), steps)]
    found = train(collection, tower, optimizer, parts, clip)
    return collection, optimizer, found


def gathered(own: dict[str, Any]) -> dict[str, Tensor]:
    """Whole tensors from the shards of all processes."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [(key, s.global_shape, s.offsets, s.tensor.clone()) for key, s in own.items()])
    whole: dict[str, Tensor] = {}
    for key, shape, offsets, tensor in (entry for entries in everyone for entry in entries):
        own_part = whole.setdefault(key, torch.full(shape, float("nan")))
        own_part[tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))] = tensor.float()
    return whole


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of any value, relative to the largest value of its tensor; nan where a value was not covered."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    found = [float((ours[key] - theirs[key].float()).abs().max() / theirs[key].float().abs().max().clamp(min=1e-6)) for key in ours]
    return float("nan") if any(value != value for value in found) else max(found)


def compare(*rules: str) -> dict[str, Any]:
    """Every sharding kind with every optimizer against one process."""
    found: dict[str, Any] = {}
    for rule in rules or RULES:
        clip = 0.05 if rule in {"sgd", "adam"} else None
        alone, alone_optimizer, expected = one_process(rule, clip)
        for kind, sharding in KINDS.items():
            if kind == "mixed" and rule != "rowwise_adagrad":
                continue
            with registry.count_dispatches() as counts:
                collection, optimizer, met = many_processes(rule, sharding, clip)
            pairs = zip(met["losses"], expected["losses"], strict=True)
            norms = zip(met["norms"], expected["norms"], strict=True)
            values = {key.removeprefix("embedding."): value for key, value in alone.state_dict().items()}
            found[f"{kind} {rule}"] = {
                "loss": max(abs(a - b) / abs(b) for a, b in pairs),
                "norm": max((abs(a - b) / abs(b) for a, b in norms), default=0.0),
                "values": largest(gathered(collection.shards()), values),
                "state": largest(gathered(optimizer.state_dict()), alone_optimizer.state_dict()) if rule != "sgd" else 0.0,
                "first": expected["losses"][0],
                "last": expected["losses"][-1],
                "dispatches": {f"{operator}.{kernel}": count for (operator, kernel), count in counts.items()},
                "kinds": sorted({placed.kind for placed in collection.plan.placed}),
            }
    return found


def quantised() -> dict[str, Any]:
    """Embeddings and gradients that travel in half precision, for kinds that send them by different collectives."""
    clip = None
    _, _, expected = one_process("sgd", clip, 20)
    found = {}
    for kind, wire in (("table_wise", "bf16"), ("row_wise", "fp16"), ("row_wise", "bf16")):
        _, _, met = many_processes("sgd", {**KINDS[kind], "quantised_comms": wire}, clip, 20)
        found[f"{kind} {wire}"] = max(abs(a - b) / abs(b) for a, b in zip(met["losses"], expected["losses"], strict=True))
    return found


def fbgemm(*kinds: str) -> dict[str, Any]:
    """FBGEMM's kernels against ours in one process."""
    found: dict[str, Any] = {}
    for rule in PLAIN:
        alone, alone_optimizer, expected = one_process(rule, None, 20)
        values = {key.removeprefix("embedding."): value for key, value in alone.state_dict().items()}
        for kind in kinds or KINDS:
            if kind == "data_parallel" or (rule.endswith("rowwise_adagrad") and kind in {"column_wise", "mixed"}):
                continue
            with registry.count_dispatches() as counts:
                collection, optimizer, met = many_processes(rule, {**KINDS[kind], "kernel": "fbgemm"}, None, 20)
            found[f"{kind} {rule}"] = {
                "loss": max(abs(a - b) / abs(b) for a, b in zip(met["losses"], expected["losses"], strict=True)),
                "values": largest(gathered(collection.shards()), values),
                "state": 0.0 if "sgd" in rule else largest(gathered(optimizer.state_dict()), alone_optimizer.state_dict()),
                "dispatches": {f"{operator}.{kernel}": count for (operator, kernel), count in counts.items()},
            }
    return found


def refused() -> dict[str, Any]:
    """What every process says of settings that cannot be."""

    def message(act: Callable[[], object]) -> str:
        try:
            act()
        except NinerankError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was refused"

    wrong: dict[str, dict[str, Any]] = {
        "unknown table": {"tables": {"itme": "row_wise"}},
        "unknown feature": {"pooling": {"histori": 3.0}},
        "no memory": {"memory_bytes": 1000},
    }
    found = {name: message(lambda own=own: sharded("sgd", own)) for name, own in wrong.items()}
    for name, rule, kind in (
        ("adam", "adam", "table_wise"),
        ("decay", "sgd", "table_wise"),
        ("rows", "plain rowwise_adagrad", "column_wise"),
    ):
        found[f"fbgemm {name}"] = message(lambda rule=rule, kind=kind: sharded(rule, {**KINDS[kind], "kernel": "fbgemm"}))
    optimizer = sharded("plain sgd", {**KINDS["table_wise"], "kernel": "fbgemm"})[1]
    found["fbgemm clip"] = message(optimizer.grad_norm)
    found["columns"] = message(lambda: sharded("sgd", {"default": "column_wise"}, {"deep": 9}))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {"by rank": everyone}


def uneven() -> dict[str, Any]:
    """Three processes, tables with fewer rows than that, and a bag that no process fills."""
    found = {}
    alone, _, expected = one_process("rowwise_adagrad", None, 10)
    for kind in ("row_wise", "data_parallel"):
        collection, _, met = many_processes("rowwise_adagrad", KINDS[kind], None, 10)
        values = {key.removeprefix("embedding."): value for key, value in alone.state_dict().items()}
        losses = max(abs(a - b) / abs(b) for a, b in zip(met["losses"], expected["losses"], strict=True))
        found[kind] = {"loss": losses, "values": largest(gathered(collection.shards()), values)}
    return found


def pair() -> dict[str, Any]:
    """All that two processes are asked, in one pair of them: they start slowly."""
    return {**compare(), "quantised": quantised(), "refused": refused(), "fbgemm": fbgemm("row_wise")}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"pair": pair, "uneven": uneven, "fbgemm": fbgemm}


def run(jobs: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Be one of the processes of a job that the command line names; the first one writes what was found."""
    rank, world_size, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    found = jobs[sys.argv[5]](*sys.argv[6:])
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(JOBS)
