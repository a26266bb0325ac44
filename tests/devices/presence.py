"""What the real torch_npu does over the stand-in of its driver: it is found, holds tensors, takes a trainer, names its collectives.

No kernel computes there, so that nothing is checked that a kernel would have made; copies are real.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import torch
from models import batch
from pyarrow import parquet
from steps import ROWS

from ninerank.device import Device, missing
from ninerank.fusion.kernels.launch import BLOCK_BYTES
from ninerank.towers.registry import build_model
from ninerank.training.processes import Processes
from ninerank.training.recipe import Recipe
from ninerank.training.trainer import Trainer

__all__ = ["checks", "process"]


def checks() -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and check of each; a check returns what was seen, and raises where it is wrong."""
    yield "Device.resolve", _resolved
    yield "streams, events, memory", _streams
    yield "tensors, copies to the device and back", _copies
    yield "tensors of two devices refused", _refused
    yield "Trainer set up, checkpoint of it", _trainer
    yield "collectives of two processes", _collectives


def _resolved() -> str:
    assert missing("npu") is None
    for name in ("npu", "npu:0", "auto"):
        device = Device.resolve(name)
        assert (device.name, device.backend, device.autocast_dtype) == ("npu:0", "hccl", torch.bfloat16), device
    return f"{device.name}, {device.backend}, bfloat16; {torch.npu.get_device_name(0)}"


def _streams() -> str:
    device = Device.resolve("npu")
    device.activate()
    stream, event = device.stream(), device.event(timing=True)
    with device.use(stream):
        event.record()
    event.synchronize()
    device.synchronize()
    before = device.memory().used_bytes
    held = torch.empty(1 << 20, device=device.torch_device)
    grown = device.memory().used_bytes - before
    assert grown >= held.numel() * 4, grown
    # What lookups of narrow rows may read behind a tensor (fusion/kernels/launch.py) is the allocator's own.
    assert grown >= held.numel() * 4 + BLOCK_BYTES, f"{grown} bytes for {held.numel() * 4}: nothing is left free behind a tensor"
    assert device.memory().total_bytes == 64 << 30
    return f"a stream, an event, {grown} bytes counted of {held.numel() * 4}"


def _copies() -> str:
    device, count = Device.resolve("npu"), 0
    host = batch(ROWS)
    there = host.to(device.torch_device, non_blocking=True)
    for side in ("request", "item"):
        for kind in ("single", "bags", "sequences"):
            mine, other = getattr(getattr(host, side), kind), getattr(getattr(there, side), kind)
            assert other.values.device == device.torch_device
            assert torch.equal(other.values.cpu(), mine.values)
            count += mine.values.numel()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool):
        tensor = torch.arange(1000).to(dtype)
        assert torch.equal(tensor.to(device.torch_device).cpu(), tensor), dtype
    return f"{count} ids of a batch and 6 types of numbers there and back"


def _refused() -> str:
    device = Device.resolve("npu")
    try:
        torch.ones(3, device=device.torch_device) + torch.ones(3)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:60]
    raise AssertionError("a sum of tensors of two devices went through")


def _trainer() -> str:
    with tempfile.TemporaryDirectory() as folder:
        rows = 40
        table = pa.table(
            {
                "click": [i % 2 for i in range(rows)],
                "user": [f"u{i % 7}" for i in range(rows)],
                "item": [f"i{i % 5}" for i in range(rows)],
                "recent": [["i1", "i2"][: i % 3] for i in range(rows)],
                "price": [float(i) for i in range(rows)],
            }
        )
        parquet.write_table(table, Path(folder, "log.parquet"))
        features = [
            {"kind": "id", "name": "user", "role": "user"},
            {"kind": "id", "name": "item", "role": "item"},
            {"kind": "sequence", "name": "recent", "role": "user", "of": "item", "max_length": 4},
            {"kind": "numeric", "name": "price", "role": "item"},
        ]
        data = {"dir": folder, "train": "log.parquet", "valid": "log.parquet", "batch_size": 16}
        mapping = {"data": data, "spec": {"labels": ["click"], "features": features}, "model": {"name": "din"}, "device": "npu"}
        recipe = Recipe.parse({**mapping, "log": {"tensorboard": False}}, "recipe")
        trainer = Trainer(recipe, Path(folder, "run"))
        own = dict(trainer.model.named_parameters())
        assert {tensor.device.type for tensor in own.values()} == {"npu"}
        assert trainer.optimizer.sparse is not None
        states = trainer.optimizer.sparse.state_dict()
        assert {tensor.device.type for tensor in states.values()} == {"npu"}
        host = dict(build_model(recipe.model, trainer.spec, recipe.embedding, seed=recipe.seed).named_parameters())
        for name, tensor in own.items():
            assert torch.equal(tensor.detach().cpu(), host[name].detach()), name
        with trainer.store:
            trainer._save()
            trainer.store.wait()
        assert any(trainer.store.directory.iterdir())
        return f"{len(own)} parameters and {len(states)} states on npu:0, start values as on the host, a checkpoint written"


def _collectives() -> str:
    """Two processes join as torchrun starts them: gloo for the host's tensors, hccl for the device's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("lane.py")), "process"]
    running = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": "0"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(error for _, error in said)[-1500:]
    return said[0][0].strip().splitlines()[-1]


def process() -> None:
    """One of the two processes."""
    device = Device.resolve("npu")
    with Processes.joined(device, timeout_s=60) as processes:
        (total,) = processes.sum(float(processes.rank + 1))
        assert total == 3.0, total
        group = torch.distributed.group.WORLD
        named = {kind: group._get_backend(torch.device(kind)).name() for kind in ("cpu", "npu")}
        assert named == {"cpu": "gloo", "npu": "hccl"}, named
        print("gloo for cpu tensors (their sum is right), hccl for npu tensors (set up, nothing sent)")
