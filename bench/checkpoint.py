"""How long a save holds training up, asynchronous and synchronous, and how long it takes to be on the disk.

--tables tables of dim --dim with Adagrad's state make up --gigabytes. Rounds take turns; before each the tables are written to, as training
does. The last save is loaded into tables of zeros and compared, bit for bit.

    synchronous       training waits until all is written, hashed and flushed
    first             asynchronous, when the buffers of the snapshot are allocated as well
    asynchronous      later ones: a copy in host memory
    on disk           from the call until the checkpoint is there
    plain file        the same bytes in one file, written and flushed without a digest: what the disk takes
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness import Result, percentile
from ninerank.training.checkpoint import CheckpointStore

Tables = dict[str, dict[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--directory", type=Path, default=None, help="of the checkpoints; a temporary one by default")
    options = parser.parse_args()
    rows = int(options.gigabytes * 1e9 / (options.tables * options.dim * 8))
    shapes = {"tables": options.tables, "rows": rows, "dim": options.dim, "threads": torch.get_num_threads()}
    tree: Tables = {
        "model": {f"t{i}": torch.randn(rows, options.dim) for i in range(options.tables)},
        "sparse": {f"t{i}.sum": torch.rand(rows, options.dim) for i in range(options.tables)},
    }
    with Result("checkpoint", shapes=shapes) as result, tempfile.TemporaryDirectory(dir=options.directory) as folder:
        measure(result, tree, Path(folder), options.rounds)


def measure(result: Result, tree: Tables, folder: Path, rounds: int) -> None:
    stores = {
        kind: CheckpointStore(folder / kind, keep_last=1, spec_digest="d", asynchronous=kind == "asynchronous")
        for kind in ("asynchronous", "synchronous")
    }
    blocked: dict[str, list[float]] = {kind: [] for kind in stores}
    on_disk: dict[str, list[float]] = {kind: [] for kind in stores}
    plain: list[float] = []
    for step in range(rounds + 1):
        for kind, store in stores.items():
            for section in tree.values():
                for tensor in section.values():
                    tensor[:: max(1, len(tensor) // 1000)] += 1.0
            start = time.perf_counter()
            store.save(step, tree, {})
            blocked[kind].append(time.perf_counter() - start)
            store.wait()
            on_disk[kind].append(time.perf_counter() - start)
        plain.append(seconds(lambda: write_plain(folder / "plain", tree)))
    num_bytes = sum(tensor.nbytes for section in tree.values() for tensor in section.values())
    result.figure("gigabytes", num_bytes / 1e9)
    result.figure("first_blocked_ms", blocked["asynchronous"][0] * 1e3)
    for kind in stores:
        result.figure(f"{kind}_blocked_ms", percentile(blocked[kind][1:], 50) * 1e3)
        result.figure(f"{kind}_on_disk_ms", percentile(on_disk[kind][1:], 50) * 1e3)
    result.figure("plain_file_ms", percentile(plain[1:], 50) * 1e3)
    result.figure("snapshot_gigabytes", stores["asynchronous"].buffers.num_bytes / 1e9)
    sync, later = percentile(blocked["synchronous"][1:], 50), percentile(blocked["asynchronous"][1:], 50)
    result.ratio("blocked_synchronous_over_asynchronous", sync / later)
    load(result, tree, stores["synchronous"])


def load(result: Result, tree: Tables, store: CheckpointStore) -> None:
    target = {name: {key: torch.zeros_like(tensor) for key, tensor in section.items()} for name, section in tree.items()}
    start = time.perf_counter()
    checkpoint = store.load()
    assert checkpoint is not None
    verified = time.perf_counter()
    checkpoint.read(target)
    result.figure("verify_ms", (verified - start) * 1e3)
    result.figure("read_ms", (time.perf_counter() - verified) * 1e3)
    if not all(torch.equal(target[name][key], tensor) for name, section in tree.items() for key, tensor in section.items()):
        raise SystemExit("the checkpoint does not hold what was saved last")


def write_plain(path: Path, tree: Tables) -> None:
    with path.open("wb") as stream:
        for section in tree.values():
            for tensor in section.values():
                stream.write(tensor.view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
