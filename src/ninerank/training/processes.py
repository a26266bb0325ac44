"""The processes of one training run, as torchrun starts them, and what they tell each other beside tensors.

with Processes.joined(device, timeout_s=600) as processes:
    Trainer(recipe, out, processes=processes).fit()
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from ninerank.device import Device
from ninerank.errors import DeviceError

__all__ = ["Processes"]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Place of this process among all; one process needs no group, and every call is then free.

    All methods are collective: every process calls them at the same point.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    @contextmanager
    def joined(cls, device: Device, timeout_s: float) -> Iterator["Processes"]:
        """Those that torchrun's environment names, joined until the block ends; this one alone where it names none.

        A collective that waits longer than `timeout_s` ends its process with an error. Raises DeviceError for an environment that is
        wrong, processes that do not find each other, and, inside the block, for another process that has ended.
        """
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            yield cls()
            return
        processes = cls(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE", _number("WORLD_SIZE")))
        if processes.world_size == 1:
            yield processes
            return
        device.activate()
        backend = "gloo" if device.kind == "cpu" else f"cpu:gloo,{device.kind}:{device.backend}"
        try:
            distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"process {processes.rank} of {processes.world_size} did not find the others: {_first_line(error)}") from None
        log.info("process %d of %d over %s", processes.rank, processes.world_size, backend)
        try:
            yield processes
        except RuntimeError as error:
            if not _is_of_peer(error):
                raise
            raise DeviceError(
                f"process {processes.rank}: another process ended or stopped answering; what it said is the cause ({_first_line(error)})"
            ) from error
        finally:
            distributed.destroy_process_group()

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks, on the first process; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        found: list[T | None] | None = [None] * self.world_size if self.is_first else None
        distributed.gather_object(value, found, dst=0)
        return found or []  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The first process's value, on all."""
        if self.world_size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def share(self, num_rows: int) -> int:
        """Rows of each process where `num_rows` are divided among all, the last ones filled up."""
        return -(-num_rows // self.world_size)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise DeviceError(f"{name}={text!r} in the environment is no number; start several processes with torchrun")
    return int(text)


def _is_of_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process: gloo tells by its text alone."""
    text = str(error)
    return isinstance(error, distributed.DistError) or any(sign in text for sign in ("gloo", "Connection closed", "NCCL", "HCCL"))


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" This is typically")[0].rpartition("] ")[2] or line
