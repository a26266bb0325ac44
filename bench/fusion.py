"""The graph compiler in process, one thread: from a batch of ids to the scores of one user and 256 candidates.

Two models over hashed ids, dim 16, MLP 400-400-400:

    narrow      DNN, 20 user fields and 19 item fields
    wide_user   DIN (attention 80-40), 200 user fields, 19 item fields, two histories of 100 items

Players, all on the same tables, with lookups inside the time:

    eager           the model as it trains, the user's row replicated for every candidate: float32
    unfused         the same graph by the compiler's backend, no pass applied, user replicated
    fused           user side once: all passes
    fused_bf16      the same with hidden layers in bfloat16
    precomputed     the same as the last, what depends on the item alone kept by item: all 256 candidates have been asked for before

Scores are compared before anything is timed: 1e-6 in float32, 1e-3 in bfloat16. Two threads score at once for `two_threads_vs_one`.

    python bench/fusion.py [--rounds 20]
"""

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import Result, Timing, interleave
from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.request import RequestLookup
from ninerank.errors import DeviceError
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import FeatureSpec, Hashed, IdFeature, SequenceFeature, Side
from ninerank.fusion import backends
from ninerank.fusion.capture import GraphInput, capture
from ninerank.fusion.compile import compile_graph, graph_for_one
from ninerank.predictor.itemvalues import ItemScorer
from ninerank.towers.config import parse_model
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import build_model
from ninerank.towers.sides import SidedTower

CANDIDATES, BUCKETS, HISTORY = 256, 25_000, 100
CALLS, ITEM_BYTES = 10, 64_000_000
MLP = {"hidden": [400, 400, 400]}
CPU = torch.device("cpu")
WORKLOADS: dict[str, dict[str, Any]] = {
    "narrow": {"users": 20, "items": 19, "histories": 0, "model": {"name": "dnn", "embedding_dim": 16, "mlp": MLP}},
    "wide_user": {
        "users": 200,
        "items": 19,
        "histories": 2,
        "model": {"name": "din", "embedding_dim": 16, "mlp": MLP, "attention_hidden": [80, 40]},
    },
}
Call = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of 10 calls of each player (default 20)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {"candidates": CANDIDATES, "dim": 16, "mlp": "400-400-400", "history": HISTORY, "threads": 1}
    with torch.inference_mode(), Result("fusion", shapes) as result:
        for name in WORKLOADS:
            workload = Workload.made(name)
            players = workload.players(result)
            # A server scores one request after another with one model: calls in a row, as many for each player.
            times = {player: each(timing) for player, timing in interleave(rows_of_calls(players), options.rounds, warmup=2).items()}
            result.timings({f"{name}_{player}": timing for player, timing in times.items()})
            prefix = "" if name == "narrow" else "wide_user_"
            fp32 = times["unfused"].p50_ms / times["fused"].p50_ms
            result.ratio("fp32_vs_unfused" if name == "narrow" else "wide_user_vs_unfused", fp32)
            if "fused_bf16" in times:
                result.ratio(
                    f"{prefix}bf16_vs_eager_fp32" if name == "narrow" else "wide_user_bf16_vs_eager",
                    times["eager"].p50_ms / times["fused_bf16"].p50_ms,
                )
            best = times.get("fused_bf16", times["fused"])
            result.ratio(f"{prefix}precompute_vs_fused", best.p50_ms / times["precomputed"].p50_ms)
            if name == "narrow":
                call = players.get("fused_bf16", players["fused"])
                result.ratio("two_threads_vs_one", two_threads(call, times))


def rows_of_calls(players: dict[str, Call]) -> dict[str, Callable[[], None]]:
    def row(call: Call) -> Callable[[], None]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    return {name: row(call) for name, call in players.items()}


def each(timing: Timing) -> Timing:
    """Timing of one call of a row."""
    return Timing(timing.p50_ms / CALLS, timing.p99_ms / CALLS, timing.min_ms / CALLS, timing.rounds)


@dataclass(frozen=True)
class Workload:
    """A model, one request, and the same request with the user's row replicated for every candidate."""

    name: str
    model: RankingModel
    spec: FeatureSpec
    request: Batch
    replicated: Batch

    @classmethod
    def made(cls, name: str) -> "Workload":
        settings = WORKLOADS[name]
        ids = Hashed(num_buckets=BUCKETS)
        features: list[Any] = [IdFeature(name=f"u{i}", role="user", encoding=ids) for i in range(settings["users"])]
        features += [IdFeature(name=f"i{i}", role="item", encoding=ids) for i in range(settings["items"])]
        features += [SequenceFeature(name=f"h{i}", role="user", of=f"i{i}", max_length=HISTORY) for i in range(settings["histories"])]
        spec = FeatureSpec(labels=("click",), features=tuple(features))
        model = build_model(parse_model(settings["model"]), spec, EmbeddingConfig(init_std=0.1), seed=0).eval()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            request = Batch(block(spec, "request", 1), block(spec, "item", CANDIDATES), torch.zeros(CANDIDATES, dtype=torch.int64))
        return cls(name, model, spec, request, replace(request, request=repeated(request.request), user_row_B=None))

    def players(self, result: Result) -> dict[str, Call]:
        """Everything that is timed; scores are compared first. Raises AssertionError where they differ."""
        collection = self.model.embedding
        sides = collection.sides(self.request)
        request_sequences = self.spec.sequence_keys("request")
        tower = SidedTower(self.model.tower, list(collection.dims), request_sequences).eval()
        graph = capture(tower, [graph_input(name, value, request_sequences) for name, value in sides.items()])
        compiled = compile_graph(graph, [sides])
        one = graph_for_one(compiled.module, compiled.records)
        result.figure(f"{self.name}_flops_before_m", compiled.before.flops / 1e6)
        result.figure(f"{self.name}_flops_after_m", compiled.after.flops / 1e6)
        result.figure(f"{self.name}_launches_before", compiled.before.launches)
        result.figure(f"{self.name}_launches_after", compiled.after.launches)
        players: dict[str, Call] = {
            "eager": lambda: torch.sigmoid(self.model(self.replicated)),
            "unfused": scorer(collection, self.replicated, backends.lower(graph, CPU)),
            "fused": scorer(collection, self.request, backends.lower(compiled.module, CPU, one=one)),
        }
        try:
            players["fused_bf16"] = scorer(collection, self.request, backends.lower(compiled.module, CPU, one=one, precision="bf16"))
        except DeviceError as error:
            print(f"bfloat16 is left out: {error}")
        best: backends.Precision = "bf16" if "fused_bf16" in players else "fp32"
        kept = ItemScorer.of(compiled.module, compiled.records, collection, ITEM_BYTES, precision=best)
        keys = np.arange(CANDIDATES)
        players["precomputed"] = lambda: torch.sigmoid(kept.logits(self.request.request, keys, lambda _: self.request.item))
        result.figure(f"{self.name}_bytes_per_item", kept.store.bytes_per_item)
        want = players["eager"]()
        for name, player in players.items():
            difference = float((player() - want).abs().max())
            allowed = 1e-3 if name == "fused_bf16" or (name == "precomputed" and best == "bf16") else 1e-6
            result.figure(f"{self.name}_{name}_difference", difference)
            if not difference <= allowed:
                raise AssertionError(f"{self.name}: scores of {name} differ by {difference}, at most {allowed} is allowed")
        return players


def scorer(collection: EmbeddingCollection, batch: Batch, run: backends.Runner) -> Call:
    """A call from ids to scores."""
    names = [given.name for given in run.inputs]
    lookup = RequestLookup(collection, run.dtypes)

    def call() -> Tensor:
        sides = lookup.sides(batch)
        return torch.sigmoid(run(*[sides[name] for name in names]))

    return call


def graph_input(name: str, value: Tensor, request_sequences: tuple[str, ...]) -> GraphInput:
    """What the compiler is told of an input."""
    if name == "user_row":
        return GraphInput(name, "joint", ("B",), torch.int64)
    sequence = name.rpartition(".seq.")[2].removeprefix("mask.")
    if sequence in request_sequences:
        return GraphInput(name, "request", ("U", f"L_{sequence}", *value.shape[2:]), value.dtype)
    side: Side = "request" if name.endswith(".request") else "item"
    return GraphInput(name, side, ("U" if side == "request" else "B", *value.shape[1:]), value.dtype)


def block(spec: FeatureSpec, side: Side, rows: int) -> Block:
    keys, sequences = spec.single_keys(side), spec.sequence_keys(side)
    none = torch.zeros(0, dtype=torch.int64)
    single = KeyedJagged(keys, torch.randint(0, BUCKETS + 1, (len(keys) * rows,)), None, rows)
    lengths = torch.full((len(sequences) * rows,), HISTORY)
    history = KeyedJagged(sequences, torch.randint(0, BUCKETS + 1, (int(lengths.sum()),)), lengths, rows)
    return Block(single, KeyedJagged((), none, none, rows), history, torch.zeros(rows, 0))


def repeated(one: Block) -> Block:
    """A block of one row, once for every candidate."""

    def ids(part: KeyedJagged) -> KeyedJagged:
        if part.lengths is None:
            return replace(part, values=part.values.repeat_interleave(CANDIDATES), num_rows=CANDIDATES)
        values = [part.values[span].repeat(CANDIDATES) for span in part.spans().values()]
        lengths = part.lengths.repeat_interleave(CANDIDATES)
        return KeyedJagged(part.keys, torch.cat([part.values[:0], *values]), lengths, CANDIDATES)

    return Block(ids(one.single), ids(one.bags), ids(one.sequences), one.dense_RF.repeat(CANDIDATES, 1))


def two_threads(call: Call, times: dict[str, Timing], seconds: float = 2.0, rounds: int = 5) -> float:
    """Throughput of two threads over that of one: the best of each over rounds that take turns."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, own in rates.items():
            done = [0] * count
            stop = time.perf_counter() + seconds

            def work(place: int, done: list[int] = done, stop: float = stop) -> None:
                with torch.inference_mode():
                    while time.perf_counter() < stop:
                        call()
                        done[place] += 1

            threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            own.append(sum(done) / (time.perf_counter() - start))
    return max(rates[2]) / max(rates[1])


if __name__ == "__main__":
    main()
