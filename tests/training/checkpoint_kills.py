"""A process that saves without a pause is killed at random moments: `python checkpoint_kills.py FOLDER MOMENTS`; prints what was seen.

Each child goes on from what the one before left, as a run does that is resumed. It tells a pipe of each save that it has seen through.
"""

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch

from ninerank.embedding.shard import Shard
from ninerank.training.checkpoint import CheckpointStore

ROWS, COLUMNS = 30_000, 64
LONGEST_S = 20.0


def store_in(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, keep_last=1, spec_digest="d", asynchronous=True)


def tree(values: torch.Tensor) -> dict[str, dict[str, Shard]]:
    return {"model": {"w": Shard((ROWS, COLUMNS), (0, 0), values)}}


def save_for_ever(folder: Path, pipe: int, first: int) -> None:
    """Each step twice, as the end of an epoch does where a checkpoint was just saved: the second one replaces the first."""
    store, values = store_in(folder), torch.empty(ROWS, COLUMNS)
    for number in range(2 * first, 2 * first + 2000):
        values.fill_(number)
        store.save(number // 2, tree(values), {"number": number})
        values.fill_(-1.0)
        store.wait()
        os.write(pipe, number.to_bytes(8, "little"))


def kill_one(folder: Path, first: int, delay_s: float) -> int:
    """Number of the last save that a child told of before it was killed, -1 if of none."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(folder, writer, first)
        finally:
            os._exit(1)
    os.close(writer)
    assert select.select([reader], [], [], LONGEST_S)[0], "the child saved nothing"
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = b""
    while part := os.read(reader, 1 << 16):
        told += part
    os.close(reader)
    return int.from_bytes(told[-8:], "little") if told else -1


def main() -> None:
    folder, moments = Path(sys.argv[1]), int(sys.argv[2])
    draw = random.Random(5)
    first, cut_short, replacing = 1, 0, 0
    for _ in range(moments):
        told = kill_one(folder, first, draw.uniform(0.0, 0.15))
        cut_short += bool(list(folder.glob(".step-*.tmp")))
        replacing += bool(list(folder.glob(".step-*.old"))) and not list(folder.glob("step-*"))
        checkpoint = store_in(folder).load()
        assert checkpoint is not None, "no checkpoint is left"
        number = checkpoint.state["number"]
        assert told <= number <= told + 1, (told, number)
        assert checkpoint.name == f"step-{number // 2}"
        values = torch.empty(ROWS, COLUMNS)
        checkpoint.read(tree(values))
        assert bool((values == number).all()), number
        first = number // 2 + 1
    print(json.dumps({"moments": moments, "cut_short": cut_short, "replacing": replacing, "last": first}))


if __name__ == "__main__":
    main()
