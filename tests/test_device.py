"""Device: every branch of the choice, with stand-ins for the hardware that this machine lacks."""

import logging
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ninerank import device as device_module
from ninerank.device import CpuEvent, CpuStream, Device, missing
from ninerank.errors import DeviceError


class Accelerator(ModuleType):
    """Stand-in for torch.cuda or torch.npu; counts what was asked of it."""

    def __init__(self, count: int = 2, capability: tuple[int, int] = (9, 0), bfloat16: bool = True) -> None:
        super().__init__("accelerator")
        self.calls: list[tuple[str, object]] = []
        self.device_count = lambda: count
        self.is_available = lambda: count > 0
        self.get_device_capability = lambda index: capability
        self.is_bf16_supported = lambda: bfloat16
        self.set_device = lambda device: self.calls.append(("set_device", device))
        self.synchronize = lambda device: self.calls.append(("synchronize", device))
        self.Stream = lambda device: self.calls.append(("Stream", device)) or "a stream"
        self.Event = lambda enable_timing: self.calls.append(("Event", enable_timing)) or "an event"
        self.stream = lambda stream: self.calls.append(("stream", stream)) or "a context"
        self.memory_allocated = lambda device: 10
        self.max_memory_allocated = lambda device: 20
        self.mem_get_info = lambda device: (5, 30)


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """A machine with two Hopper GPUs and no NPU."""
    module = Accelerator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"cuda": module}[kind])
    monkeypatch.setattr(device_module, "find_spec", lambda name: None)
    return module


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """A machine with two NPUs; torch names the type once torch_npu is imported, as the stand-in's constructor cannot."""
    module = Accelerator()
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setattr(device_module, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: {"npu": module}[kind])
    monkeypatch.setattr(torch, "device", lambda kind, index=None: SimpleNamespace(type=kind, index=index))
    return module


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with neither."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device_module, "find_spec", lambda name: None)


def test_cpu_runs_everywhere() -> None:
    device = Device.resolve("cpu")
    assert (device.name, device.kind, device.backend, device.torch_device) == ("cpu", "cpu", "gloo", torch.device("cpu"))
    assert "'cpu' was asked for" in device.reason


@pytest.mark.parametrize("spec", ["", "tpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "auto:0", "CUDA", " cpu", "npu:99999", "cuda:0\n"])
def test_names_that_are_none_are_refused(spec: str) -> None:
    with pytest.raises(DeviceError, match="is none of auto, cpu, cuda, cuda:<index>, npu, npu:<index>"):
        Device.resolve(spec)


@pytest.mark.usefixtures("bare")
def test_auto_falls_to_cpu_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ninerank.device"):
        device = Device.resolve("auto")
    assert device.name == "cpu"
    assert "no npu: torch_npu is not installed" in device.reason
    assert "no cuda: torch" in device.reason
    assert [record.getMessage() for record in caplog.records] == [f"device cpu ({device.reason})"]


def test_auto_takes_cuda_before_cpu(cuda: Accelerator) -> None:
    device = Device.resolve("auto")
    assert (device.name, device.backend, device.autocast_dtype) == ("cuda:0", "nccl", torch.bfloat16)


def test_auto_takes_npu_before_cuda(npu: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = Device.resolve("auto")
    assert (device.name, device.backend, device.autocast_dtype) == ("npu:0", "hccl", torch.bfloat16)


def test_index_is_taken_as_named(cuda: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Device.resolve("cuda:1").torch_device == torch.device("cuda", 1)


def test_index_comes_from_torchrun(cuda: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Device.resolve("cuda").name == "cuda:1"
    assert Device.resolve("auto").name == "cuda:1"


def test_index_that_is_not_there_is_refused(cuda: Accelerator) -> None:
    with pytest.raises(DeviceError, match=r"'cuda:2': no such device; indices start at 0 and there are 2"):
        Device.resolve("cuda:2")
    cuda.device_count = lambda: 1
    with pytest.raises(DeviceError, match="it is the only one"):
        Device.resolve("cuda:1")


@pytest.mark.parametrize("rank", ["x", "-1"])
def test_local_rank_that_is_no_index_is_refused(cuda: Accelerator, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(DeviceError, match=f"LOCAL_RANK='{rank}'"):
        Device.resolve("cuda")


def test_gpu_before_ampere_has_no_autocast(cuda: Accelerator) -> None:
    cuda.get_device_capability = lambda index: (7, 5)
    assert Device.resolve("cuda").autocast_dtype is None


def test_npu_without_bfloat16_has_no_autocast(npu: Accelerator) -> None:
    npu.is_bf16_supported = lambda: False
    assert Device.resolve("npu").autocast_dtype is None


def test_cuda_missing_from_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match=r"device 'cuda': torch .* is a build without CUDA; pip install --force-reinstall torch==\d"):
        Device.resolve("cuda")


def test_cuda_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        DeviceError, match=r"device 'cuda:0': torch is built for CUDA 13\.0, but no NVIDIA GPU or driver is visible; .*nvidia-smi"
    ):
        Device.resolve("cuda:0")


@pytest.mark.usefixtures("bare")
def test_npu_missing_package() -> None:
    with pytest.raises(
        DeviceError, match=r"torch_npu is not installed; pip install torch_npu==\d+\.\d+\.\d+; install Huawei's CANN toolkit"
    ):
        Device.resolve("npu")


def test_npu_missing_cann(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("libascendcl.so: cannot open shared object file\nmore")

    monkeypatch.setattr(device_module, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(device_module, "import_module", broken)
    with pytest.raises(
        DeviceError, match=r"does not load: libascendcl\.so: cannot open shared object file; install Huawei's CANN"
    ) as caught:
        Device.resolve("npu:0")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Device.resolve("auto").name == "cpu"


def test_npu_error_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError

    monkeypatch.setattr(device_module, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(device_module, "import_module", broken)
    problem = missing("npu")
    assert problem is not None
    assert "does not load: OSError" in problem.what


def test_npu_not_visible(npu: Accelerator) -> None:
    npu.device_count = lambda: 0
    with pytest.raises(DeviceError, match=r"torch_npu loads, but no NPU is visible; .*ASCEND_RT_VISIBLE_DEVICES"):
        Device.resolve("npu")


def test_accelerator_calls_reach_its_module(cuda: Accelerator) -> None:
    device = Device.resolve("cuda:1")
    device.activate()
    device.synchronize()
    assert device.stream() == "a stream"
    assert device.event(timing=True) == "an event"
    assert device.use("a stream") == "a context"
    where = torch.device("cuda", 1)
    assert cuda.calls == [("set_device", where), ("synchronize", where), ("Stream", where), ("Event", True), ("stream", "a stream")]
    assert device.memory() == device_module.Memory(10, 20, 30)


def test_cpu_streams_and_events_are_done_at_once() -> None:
    device = Device.resolve("cpu")
    device.activate()
    device.synchronize()
    stream, start, end = device.stream(), device.event(timing=True), device.event(timing=True)
    assert isinstance(stream, CpuStream)
    with device.use(stream):
        start.record(stream)
        stream.wait_event(start)
        stream.wait_stream(device.stream())
        end.record()
    stream.synchronize()
    end.wait()
    end.synchronize()
    assert stream.query()
    assert end.query()
    assert 0 <= start.elapsed_time(end) < 60_000
    assert stream.record_event().time_s is not None
    assert stream.record_event(start) is start


def test_elapsed_time_needs_timing_and_a_record() -> None:
    recorded = CpuEvent(timing=True)
    recorded.record()
    for other in (CpuEvent(), CpuEvent(timing=True)):
        with pytest.raises(DeviceError, match="timing=True"):
            recorded.elapsed_time(other)


def test_autocast_runs_in_the_half_type(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 2)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    device = Device.resolve("cpu")
    with device.autocast():
        assert (x @ x).dtype == torch.bfloat16
    with device.autocast(enabled=False):
        assert (x @ x).dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "avx2": True})
    device = Device.resolve("cpu")
    assert device.autocast_dtype is None
    with device.autocast():
        assert (x @ x).dtype == torch.float32


def test_cpu_memory_is_of_this_process() -> None:
    memory = Device.resolve("cpu").memory()
    assert 10e6 < memory.used_bytes <= memory.peak_bytes <= memory.total_bytes


def test_cpu_memory_is_bounded_by_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device_module, "CGROUP_LIMIT", limit)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for text, total in (("1073741824\n", 1 << 30), ("max\n", whole), (None, whole)):
        limit.unlink(missing_ok=True)
        if text is not None:
            limit.write_text(text)
        assert Device.resolve("cpu").memory().total_bytes == total


def test_device_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Device.resolve("cpu").name = "cuda"  # type: ignore[misc]


@pytest.mark.gpu
def test_real_gpu() -> None:
    device = Device.resolve("cuda")
    device.activate()
    start, end, stream = device.event(timing=True), device.event(timing=True), device.stream()
    with device.use(stream):
        start.record()
        total = torch.ones(1000, 1000, device=device.torch_device).sum()
        end.record()
    device.synchronize()
    assert total.item() == 1e6
    assert start.elapsed_time(end) >= 0
    memory = device.memory()
    assert 0 < memory.used_bytes <= memory.peak_bytes <= memory.total_bytes
