"""Time of a training epoch: sparse tables against dense-reference mode, on a Criteo-shaped log with 2.6 million rows of tables.

The log has 13 numbers and 26 ids of 100,000 values each, Zipf(1.05) distributed. All players train the same model (DeepFM, dim 16 and
1, MLP 400-400-400) on the same batches in the same order:

    dense          every table an ordinary parameter under torch.optim.Adam: what the published reference results use
    sparse_adam    touched rows alone, lazy Adam
    dynamic_adam   the same with dynamic tables: raw 64-bit ids, rows made as ids come
    sparse_rowwise touched rows alone, row-wise Adagrad

Rounds of whole epochs take turns. Before anything is timed, dense and sparse tables are checked to give the same loss on the first
batch (same start values), and every loss must be finite and fall.

    python bench/training.py [--rows 204800] [--rounds 3]
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from harness import Result, interleave
from ninerank.training.recipe import Recipe
from ninerank.training.trainer import Trainer

NUM_IDS, NUM_NUMBERS, ID_VALUES = 26, 13, 100_000
SPARSE = {"mode": "sparse"}
PLAYERS: dict[str, dict[str, Any]] = {
    "dense": {"embedding": {"mode": "dense"}},
    "sparse_adam": {"embedding": SPARSE, "sparse": {"kind": "adam", "lr": 1e-3}},
    "dynamic_adam": {"embedding": SPARSE, "sparse": {"kind": "adam", "lr": 1e-3}, "encoding": {"kind": "dynamic"}},
    "sparse_rowwise": {"embedding": SPARSE, "sparse": {"kind": "rowwise_adagrad", "lr": 0.05}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=204_800, help="rows of the log (default: 50 batches)")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs of each player")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: all cores)")
    parser.add_argument("--players", nargs="+", default=list(PLAYERS), choices=list(PLAYERS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = {"rows": options.rows, "tables": NUM_IDS, "table_rows": ID_VALUES, "batch": 4096, "dim": 16, "mlp": "400-400-400"}
    with tempfile.TemporaryDirectory(prefix="ninerank-training-") as folder, Result("training", shapes=shapes) as result:
        out = Path(folder)
        write_log(out, options.rows)
        players = {name: Player(out, name) for name in options.players}
        first = {name: player.epoch() for name, player in players.items()}
        if {"dense", "sparse_adam"} <= first.keys() and abs(first["dense"][0] - first["sparse_adam"][0]) > 1e-5:
            raise AssertionError(f"first losses differ: {first['dense'][0]} dense, {first['sparse_adam'][0]} sparse")
        times = interleave({name: player.epoch for name, player in players.items()}, options.rounds, warmup=0)
        result.timings(times)
        for name, player in players.items():
            last = player.epoch()[-1]
            if not last < first[name][0]:
                raise AssertionError(f"{name}: loss went from {first[name][0]} to {last}")
            result.figure(f"{name}_samples_per_s", player.num_rows / times[name].p50_ms * 1e3)
            result.figure(f"{name}_loss_of_last_batch", last)
            if name != "dense" and "dense" in times:
                result.ratio(f"dense_over_{name}", times["dense"].p50_ms / times[name].p50_ms)


def write_log(folder: Path, num_rows: int) -> None:
    """train.parquet and valid.parquet; the click depends on some ids and numbers."""
    draw = np.random.default_rng(0)
    weights = np.cumsum(np.arange(1, ID_VALUES + 1, dtype=np.float64) ** -1.05)
    for split, count in (("train", num_rows), ("valid", 4096)):
        ids = [np.searchsorted(weights, draw.random(count) * weights[-1]) for _ in range(NUM_IDS)]
        numbers = draw.standard_normal((NUM_NUMBERS, count))
        logit = np.sin(ids[0]) + np.cos(ids[1] * 7.0) + 0.5 * numbers[0] - 1.5
        columns = {"click": (draw.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int64)}
        columns |= {f"c{i}": own * 2_654_435_761 for i, own in enumerate(ids)} | {f"n{i}": own for i, own in enumerate(numbers)}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")


class Player:
    """One way to train, on the shared log."""

    def __init__(self, folder: Path, name: str) -> None:
        player = PLAYERS[name]
        encoding = player.get("encoding", {"kind": "hashed", "num_buckets": ID_VALUES - 1})
        names = [(f"c{i}", "user" if i % 2 else "item") for i in range(NUM_IDS)]
        features = [{"kind": "id", "name": c, "role": role, "dtype": "int64", "encoding": encoding} for c, role in names]
        features += [{"kind": "numeric", "name": f"n{i}", "role": "user"} for i in range(NUM_NUMBERS)]
        recipe = {
            "data": {"dir": str(folder), "train": "train.parquet", "valid": "valid.parquet", "batch_size": 4096},
            "spec": {"labels": ["click"], "features": features},
            "model": {"name": "deepfm", "embedding_dim": 16, "mlp": {"hidden": [400, 400, 400]}},
            "embedding": player["embedding"],
            "optimizer": {"kind": "adam", "lr": 1e-3, **({"sparse": player["sparse"]} if "sparse" in player else {})},
            "device": "cpu",
            "log": {"tensorboard": False},
        }
        self._trainer = Trainer(Recipe.parse(recipe, name), folder / name)
        self._epoch = 0
        self.num_rows = self._trainer.train.num_rows

    def epoch(self) -> list[float]:
        """Train one epoch; returns the loss of each batch."""
        losses = []
        self._trainer.model.train()
        for batch in self._trainer.train.epoch(self._epoch):
            losses.append(self._trainer.step(batch)[0])
            self._trainer.progress.step += 1
        self._epoch += 1
        return torch.stack(losses).tolist()


if __name__ == "__main__":
    main()
