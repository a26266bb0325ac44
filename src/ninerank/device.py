"""Where the work runs: CPU, NVIDIA GPU or Ascend NPU, resolved once into a frozen `Device`.

The only module besides the kernels and the torchrec adapter that names a backend. Everything else asks the `Device`
for its torch device, its collective backend, its autocast dtype, its streams and events, and its memory figures.
"""

import logging
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ninerank.errors import DeviceError

__all__ = ["KINDS", "CpuEvent", "CpuStream", "Device", "Memory", "Missing", "missing"]

log = logging.getLogger(__name__)

KINDS = ("npu", "cuda", "cpu")  # in the order in which `auto` tries them
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes in use now, at the peak, and in all. On CPU: resident set of this process, and what the machine or its cgroup grants."""

    used_bytes: int
    peak_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Missing:
    """Why a kind of device cannot run here. mend: what to install or type."""

    what: str
    mend: str


@dataclass(frozen=True)
class Device:
    """One device to run on; made by `Device.resolve`.

    name: `cpu`, `cuda:0`, `npu:1`. backend: collective backend of torch.distributed (gloo, nccl, hccl).
    autocast_dtype: the half type that this hardware multiplies natively and that needs no loss scaling (bfloat16), or None.
    reason: why this device was taken, for the log and `ninerank doctor`.

    >>> Device.resolve("cpu").name, Device.resolve("cpu").backend
    ('cpu', 'gloo')
    >>> Device.resolve("tpu")
    Traceback (most recent call last):
    ...
    ninerank.errors.DeviceError: device 'tpu': is none of auto, cpu, cuda, cuda:<index>, npu, npu:<index>
    """

    name: str
    torch_device: torch.device
    backend: str
    autocast_dtype: torch.dtype | None
    reason: str

    @classmethod
    def resolve(cls, spec: str = "auto") -> "Device":
        """Device that `spec` names: `auto` (npu, then cuda, then cpu), `cpu`, `cuda[:index]` or `npu[:index]`.

        Without an index, a process that torchrun started takes the one in LOCAL_RANK, any other process takes 0.
        Raises DeviceError, with what to install, where the device cannot run.
        """
        kind, index = _parse(spec)
        if kind != "auto":
            problem = missing(kind)
            if problem is not None:
                raise DeviceError(f"device {spec!r}: {problem.what}; {problem.mend}")
            return cls._of(kind, index, f"{spec!r} was asked for")
        passed_over: list[str] = []
        for kind in KINDS:
            problem = missing(kind)
            if problem is None:
                break
            passed_over.append(f"no {kind}: {problem.what}")
        device = cls._of(kind, None, "; ".join(["the first that runs of npu, cuda, cpu", *passed_over]))
        log.info("device %s (%s)", device.name, device.reason)
        return device

    @classmethod
    def _of(cls, kind: str, index: int | None, reason: str) -> "Device":
        if kind == "cpu":
            return cls("cpu", torch.device("cpu"), BACKENDS["cpu"], _cpu_autocast_dtype(), reason)
        module = _backend(kind)
        count = module.device_count()
        if index is None:
            local_rank = os.environ.get("LOCAL_RANK", "0")
            if not local_rank.isdecimal():
                raise DeviceError(f"device {kind!r}: LOCAL_RANK={local_rank!r} in the environment is no device index")
            index = int(local_rank)
        if index >= count:
            have = "it is the only one" if count == 1 else f"there are {count}"
            raise DeviceError(f"device '{kind}:{index}': no such device; indices start at 0 and {have}")
        dtype = torch.bfloat16 if _has_bfloat16(kind, module, index) else None
        return cls(f"{kind}:{index}", torch.device(kind, index), BACKENDS[kind], dtype, reason)

    @property
    def kind(self) -> str:
        """`cpu`, `cuda` or `npu`."""
        return self.torch_device.type

    def activate(self) -> None:
        """Make this the current device of the calling thread (kernels launch on the current device); nothing on CPU."""
        if self.kind != "cpu":
            _backend(self.kind).set_device(self.torch_device)

    def synchronize(self) -> None:
        """Wait until all work queued on this device is done; nothing on CPU, where a call returns when it is done."""
        if self.kind != "cpu":
            _backend(self.kind).synchronize(self.torch_device)

    def autocast(self, enabled: bool = True) -> AbstractContextManager[object]:
        """Context in which matrix work runs in `autocast_dtype`; changes nothing where that is None or `enabled` is false."""
        if not enabled or self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.kind, dtype=self.autocast_dtype)

    def stream(self) -> Any:
        """New stream: torch.cuda.Stream, torch.npu.Stream or CpuStream; enter it with `use`."""
        return CpuStream() if self.kind == "cpu" else _backend(self.kind).Stream(device=self.torch_device)

    def use(self, stream: Any) -> AbstractContextManager[object]:
        """Context whose work is queued on `stream` (one of `self.stream()`)."""
        return nullcontext() if self.kind == "cpu" else _backend(self.kind).stream(stream)

    def event(self, timing: bool = False) -> Any:
        """New event: torch.cuda.Event, torch.npu.Event or CpuEvent; `elapsed_time(end)` in milliseconds needs `timing`."""
        return CpuEvent(timing) if self.kind == "cpu" else _backend(self.kind).Event(enable_timing=timing)

    def memory(self) -> Memory:
        """Memory figures of this process on this device."""
        if self.kind == "cpu":
            return _cpu_memory()
        module, device = _backend(self.kind), self.torch_device
        return Memory(module.memory_allocated(device), module.max_memory_allocated(device), module.mem_get_info(device)[1])


class CpuStream:
    """A stream of a device without queues: whatever it is asked to wait for is done already."""

    def synchronize(self) -> None:
        """Done."""

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: object) -> None:
        """Done."""

    def wait_event(self, event: object) -> None:
        """Done."""

    def record_event(self, event: "CpuEvent | None" = None) -> "CpuEvent":
        event = event or CpuEvent()
        event.record(self)
        return event


class CpuEvent:
    """A point in time on a device without queues.

    >>> start, end = CpuEvent(timing=True), CpuEvent(timing=True)
    >>> start.record(); end.record()
    >>> start.elapsed_time(end) >= 0.0
    True
    """

    def __init__(self, timing: bool = False) -> None:
        self.timing = timing
        self.time_s: float | None = None

    def record(self, stream: object = None) -> None:
        self.time_s = time.perf_counter()

    def synchronize(self) -> None:
        """Done."""

    def wait(self, stream: object = None) -> None:
        """Done."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "CpuEvent") -> float:
        """Milliseconds from this event to `end`; both need `timing` and to have been recorded."""
        if not (self.timing and end.timing) or self.time_s is None or end.time_s is None:
            raise DeviceError("elapsed_time: both events must be made with timing=True and recorded before")
        return (end.time_s - self.time_s) * 1e3


def missing(kind: str) -> Missing | None:
    """What keeps devices of `kind` (cpu, cuda, npu) from running here, or None where they run."""
    checks: dict[str, Callable[[], Missing | None]] = {"cpu": lambda: None, "cuda": _missing_cuda, "npu": _missing_npu}
    return checks[kind]()


def _missing_cuda() -> Missing | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        mend = f"pip install --force-reinstall torch=={_release(torch.__version__)}   (from an index that has CUDA builds of it)"
        return Missing(f"torch {torch.__version__} is a build without CUDA", mend)
    what = f"torch is built for CUDA {torch.version.cuda}, but no NVIDIA GPU or driver is visible"
    return Missing(what, "install NVIDIA's driver; nvidia-smi must list the GPU, and CUDA_VISIBLE_DEVICES must not hide it")


def _missing_npu() -> Missing | None:
    cann = "install Huawei's CANN toolkit and run: source /usr/local/Ascend/ascend-toolkit/set_env.sh"
    package = f"pip install torch_npu=={_release(torch.__version__)}"
    if find_spec("torch_npu") is None:
        return Missing("torch_npu is not installed", f"{package}; {cann}")
    try:
        module = _backend("npu")
        if module.is_available() and module.device_count() > 0:
            return None
    except Exception as error:  # noqa: BLE001 - a missing or broken driver surfaces as almost any type from torch_npu
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Missing(f"torch_npu is installed but does not load: {first_line}", f"{cann}   (and if it is of another torch: {package})")
    return Missing(
        "torch_npu loads, but no NPU is visible", f"npu-smi info must list it, ASCEND_RT_VISIBLE_DEVICES must not hide it; {cann}"
    )


def _release(version: str) -> str:
    return version.partition("+")[0]


def _backend(kind: str) -> ModuleType:
    """torch.cuda or torch.npu; the latter exists once torch_npu is imported."""
    if kind == "npu":
        import_module("torch_npu")
    module: ModuleType = torch.get_device_module(kind)
    return module


def _parse(spec: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(auto|cpu)|(cuda|npu)(?::(\d{1,4}))?", spec)
    if match is None:
        raise DeviceError(f"device {spec!r}: is none of auto, cpu, cuda, cuda:<index>, npu, npu:<index>")
    return match[1] or match[2], None if match[3] is None else int(match[3])


def _has_bfloat16(kind: str, module: ModuleType, index: int) -> bool:
    if kind == "cuda":  # since Ampere; older GPUs emulate it, slower than float32
        return bool(module.get_device_capability(index)[0] >= 8)
    return bool(module.is_bf16_supported())


def _cpu_autocast_dtype() -> torch.dtype | None:
    """bfloat16 where the processor multiplies it (AMX, AVX-512 BF16, Arm BF16); elsewhere emulation is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(flag) for flag in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if native else None


def _cpu_memory() -> Memory:
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    total = os.sysconf("SC_PHYS_PAGES") * page_bytes
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * page_bytes
    except OSError:  # no /proc outside Linux
        used = peak
    with suppress(OSError, ValueError):  # no cgroup v2, or `max`
        total = min(total, int(CGROUP_LIMIT.read_text(encoding="ascii")))
    return Memory(used, max(peak, used), total)
