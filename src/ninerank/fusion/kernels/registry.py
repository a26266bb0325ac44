"""Which kernel runs an operator: asked for by name, or chosen by device and logged once.

    choose("embedding_bag", "cpu", "auto")   -> the Numba kernel
    choose("embedding_bag", "cpu", "torch")  -> the plain torch reference
    choose("embedding_bag", "cpu", "cuda")   -> DeviceError that lists what is there

Kernels are named by what they are written in: `numba` (cpu), `triton` (cuda, npu, and cpu under TRITON_INTERPRET=1)
and `torch` (everywhere). `auto` takes the first registered one that runs on the device.
"""

import importlib
import importlib.util
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ninerank.errors import DeviceError, nearest

__all__ = ["AUTO", "Kernel", "available", "choose", "count_dispatches", "is_plain", "note", "operators", "preferring", "register"]

AUTO = "auto"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operator.

    module, function: where it is; imported when first chosen. device_types: torch device types it runs on, empty for all.
    requires: package that must be installed.
    """

    operator: str
    name: str
    module: str
    function: str
    device_types: tuple[str, ...] = ()
    requires: str | None = None

    def obstacle(self, device_type: str) -> str | None:
        """Why this kernel cannot run on `device_type`; None where it can."""
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            return f"package {self.requires} is not installed"
        if self.name == "triton" and device_type == "cpu":
            return None if os.environ.get("TRITON_INTERPRET") == "1" else "Triton runs on cpu only under TRITON_INTERPRET=1"
        if self.device_types and device_type not in self.device_types:
            return f"runs on {', '.join(self.device_types)}"
        return None


_kernels: dict[str, list[Kernel]] = {}
_chosen: dict[tuple[str, str, str], tuple[Kernel, Callable[..., Any]]] = {}
_counters: list[Counter[tuple[str, str]]] = []
_lock = threading.Lock()
_preferred: ContextVar[str | None] = ContextVar("preferred", default=None)


def register(kernel: Kernel) -> None:
    """Add a kernel; the order of registration is the order in which `auto` tries."""
    with _lock:
        kernels = _kernels.setdefault(kernel.operator, [])
        if any(other.name == kernel.name for other in kernels):
            raise ValueError(f"operator {kernel.operator} has a kernel {kernel.name!r} already")
        kernels.append(kernel)


def available(operator: str, device_type: str) -> tuple[str, ...]:
    """Names of the kernels that can run `operator` on a device type ("cpu", "cuda", "npu"), in the order `auto` tries."""
    return tuple(kernel.name for kernel in _kernels.get(operator, ()) if kernel.obstacle(device_type) is None)


def operators() -> tuple[str, ...]:
    """Names of all operators whose modules are loaded."""
    return tuple(_kernels)


def choose(operator: str, device_type: str, name: str = AUTO) -> Callable[..., Any]:
    """Function that runs `operator` on `device_type`; every call counts as one dispatch.

    Raises DeviceError for a name that is unknown or cannot run there, naming those that can.
    """
    preferred = _preferred.get()
    if preferred is not None and name == AUTO and preferred in available(operator, device_type):
        name = preferred
    key = (operator, device_type, name)
    found = _chosen.get(key)
    if found is None:
        found = _resolve(operator, device_type, name)
        with _lock:
            _chosen[key] = found
    kernel, function = found
    note(operator, kernel.name)
    return function


def note(operator: str, kernel: str) -> None:
    """Count one dispatch; for kernels of others, which are called without `choose`."""
    if _counters:
        with _lock:
            for counter in _counters:
                counter[operator, kernel] += 1


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """In this thread let `auto` take the kernel `name` of every operator that has it and can run it.

    >>> with preferring("torch"):
    ...     pass
    """
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether an operator on these tensors may call its kernel at once, without torch's dispatcher: ordinary tensors, nothing to record.

    The dispatcher costs as much as a small lookup; a request has several.
    """
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in (Tensor, Parameter) or (grad and tensor.requires_grad)):
            return False
    return torch._C._len_torch_dispatch_stack() == 0 and not torch.compiler.is_compiling() and not torch._C._is_tracing()


@contextmanager
def count_dispatches() -> Iterator[Counter[tuple[str, str]]]:
    """Count (operator, kernel name) for every dispatch, from any thread, until the block ends.

    >>> with count_dispatches() as counts:
    ...     pass
    >>> sum(counts.values())
    0
    """
    counter: Counter[tuple[str, str]] = Counter()
    with _lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            _counters[:] = [other for other in _counters if other is not counter]


def _resolve(operator: str, device_type: str, name: str) -> tuple[Kernel, Callable[..., Any]]:
    kernels = {kernel.name: kernel for kernel in _kernels.get(operator, ())}
    if not kernels:
        raise DeviceError(f"no operator {operator!r}; {nearest(operator, _kernels)}")
    runs = available(operator, device_type)
    if name == AUTO:
        kernel = kernels[runs[0]] if runs else None
    else:
        kernel = kernels.get(name)
    if kernel is None or kernel.name not in runs:
        why = "it has no such kernel" if kernel is None else kernel.obstacle(device_type)
        there = ", ".join((AUTO, *runs)) if runs else "none"
        raise DeviceError(f"operator {operator}: kernel {name!r} cannot run on {device_type}: {why}; kernels that can: {there}")
    if name == AUTO:
        logger.info("operator %s on %s: kernel %s (of %s)", operator, device_type, kernel.name, ", ".join(runs))
    return kernel, getattr(importlib.import_module(kernel.module), kernel.function)
