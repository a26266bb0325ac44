"""One spec with every kind of feature on both sides, and random batches for it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import (
    Bucketize,
    FeatureSpec,
    Hashed,
    IdFeature,
    NumericFeature,
    SequenceFeature,
    Side,
)

# Processes of tests, which import each other from this folder.
collect_ignore = ["dynamic_job.py", "sharding_job.py"]

WAIT_S = 600
MakeBatch = Callable[..., Batch]


@pytest.fixture
def spec() -> FeatureSpec:
    hashed = Hashed(num_buckets=30)
    features = (
        IdFeature(name="user", role="user", encoding=Hashed(num_buckets=20)),
        SequenceFeature(name="recent", role="user", of="item", max_length=6),
        IdFeature(name="item", role="item", encoding=hashed),
        IdFeature(name="interests", role="user", encoding=Hashed(num_buckets=9), multi=True, pooling="mean", max_length=5),
        IdFeature(name="hour", role="context", encoding=Hashed(num_buckets=24)),
        NumericFeature(name="age", role="user", transform=Bucketize(num_buckets=3, boundaries=(20.0, 40.0))),
        NumericFeature(name="income", role="user"),
        IdFeature(name="tags", role="item", encoding=Hashed(num_buckets=11), multi=True, pooling="sum", max_length=4),
        IdFeature(name="brands", role="item", encoding=Hashed(num_buckets=7), multi=True, pooling="mean", max_length=4),
        SequenceFeature(name="similar", role="item", of="item", max_length=3),
        SequenceFeature(name="seen_tags", role="user", of="tags", max_length=4),
        IdFeature(name="last_item", role="user", encoding=hashed, table="item"),
        NumericFeature(name="price", role="item"),
        NumericFeature(name="rating", role="item"),
    )
    return FeatureSpec(labels=("click",), features=features)


@pytest.fixture
def narrow_spec() -> FeatureSpec:
    """Single ids alone, the shape of most public logs."""
    names = (("a", "user", 5), ("b", "user", 50), ("c", "item", 500))
    return FeatureSpec(
        labels=("click",), features=tuple(IdFeature(name=n, role=r, encoding=Hashed(num_buckets=size)) for n, r, size in names)
    )


def keyed(spec: FeatureSpec, keys: Sequence[str], rows: int, most: int | None, draw: torch.Generator) -> KeyedJagged:
    """Random ids; `most` None gives exactly one id a row, else 0 to `most`, with empty rows and repeats."""
    lengths = torch.ones(len(keys) * rows, dtype=torch.int64)
    if most is not None:
        caps = [min(most, int(spec.feature(key).max_length or most)) for key in keys for _ in range(rows)]
        lengths = torch.tensor([int(torch.randint(0, cap + 1, (), generator=draw)) for cap in caps], dtype=torch.int64)
    sizes = [spec.tables[str(spec.table_of(key))].num_rows for key in keys for _ in range(rows)]
    parts = [torch.randint(0, size, (int(n),), generator=draw) for size, n in zip(sizes, lengths, strict=True)]
    values = torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
    return KeyedJagged(tuple(keys), values, None if most is None else lengths, rows)


def block(spec: FeatureSpec, side: Side, rows: int, draw: torch.Generator, most: int) -> Block:
    return Block(
        keyed(spec, spec.single_keys(side), rows, None, draw),
        keyed(spec, spec.bag_keys(side), rows, most, draw),
        keyed(spec, spec.sequence_keys(side), rows, most, draw),
        torch.randn(rows, len(spec.dense_keys(side)), generator=draw),
    )


@pytest.fixture
def make_batch() -> MakeBatch:
    def make(spec: FeatureSpec, rows: int, *, requests: int | None = None, most: int = 4, seed: int = 0) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        user_row_B = None if requests is None else torch.randint(0, requests, (rows,), generator=draw)
        request = block(spec, "request", rows if requests is None else requests, draw, most)
        label_BT = torch.randint(0, 2, (rows, len(spec.labels)), generator=draw).float()
        return Batch(request, block(spec, "item", rows, draw, most), user_row_B, label_BT)

    return make


@pytest.fixture(scope="session")
def run_job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What the first of `world_size` processes of a job found; fails with the output of the process that failed."""

    def run(script: Path, *job: str, world_size: int = 2) -> dict[str, Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = tmp_path_factory.mktemp("job") / "found.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(world_size), str(port), str(out), *job],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            for rank in range(world_size)
        ]
        try:
            said = [process.communicate(timeout=WAIT_S)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * world_size, "\n".join(said)[-4000:]
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run
