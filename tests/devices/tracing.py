"""Watches every operator on a device that is not there: tensors are fake but carry its type, so that torch and its adapter decide as on it.

    with watching("npu") as watch:      # inside, torch.device("npu") tensors are fake and no kernel runs
        step()
    watch.findings                      # what would have gone wrong, each with the line of ours that asked for it

A finding is a copy from the device to the host, an operator that gets tensors of two devices, or one without a kernel for the device (which
torch_npu would run on the host without a word). An operator without a kernel of its own is fine where torch composes it of others that have
one. Operators of Ninerank count through the host code of their Triton kernels, which runs under the same watch; launches are recorded.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from launches import Launch, recorded
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Watch", "watching"]

ROOT = Path(__file__).resolve().parents[2]
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize"}
READS = {"aten::_local_scalar_dense", "aten::equal"}
# The one place where the host must wait for the device: how many distinct rows a batch has decides what is launched.
ALLOWED_READS = {("segments.py", "by_row")}
COMPOSITE = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
MOST_PROGRAMS = 65_535
HARNESS = {"tracing.py", "launches.py", "steps.py", "lane.py"}


@dataclass
class Watch:
    """What was seen. longest: entries of the row that occurs most, which the host asks for (`by_row`).

    operators: those of torch, with how often; composed: those among them that torch composes; own: operators of Ninerank, with the kernel.
    copies_in: copies from the host. reads: waits for the device that are allowed.
    """

    device_type: str
    longest: int = 3
    findings: list[str] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    composed: set[str] = field(default_factory=set)
    own: Counter[str] = field(default_factory=Counter)
    launches: dict[tuple[Any, ...], Launch] = field(default_factory=dict)
    copies_in: int = 0
    reads: int = 0
    is_paused: bool = False
    fake: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away: what is built here is built on the host and copied where there is a device."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def find(self, what: str) -> None:
        line = f"{what}; asked for at {_our_line()}"
        if line not in self.findings:
            self.findings.append(line)

    def launched(self, launch: Launch, tensors: list[Tensor]) -> None:
        self.launches[launch.variant] = launch
        self.own[f"{launch.name} (launch)"] += 1
        elsewhere = sorted({tensor.device.type for tensor in tensors} - {self.device_type})
        if elsewhere:
            self.find(f"tensors of {' and '.join(elsewhere)} in a launch of {launch.name}")
        if len(launch.programs) != 1 or not 1 <= launch.programs[0] <= MOST_PROGRAMS:
            self.find(f"{launch.programs} programs in a launch of {launch.name}; one dimension of 1 to {MOST_PROGRAMS} is needed")


@contextmanager
def watching(device_type: str, *, longest: int = 3) -> Iterator[Watch]:
    """Fake tensors inside, every operator on `device_type` looked at."""
    watch = Watch(device_type, longest)
    with ExitStack() as stack:
        if device_type == "cuda":  # what a build without CUDA cannot be asked
            properties = SimpleNamespace(multi_processor_count=132)
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=properties))
            stack.enter_context(mock.patch.object(torch.accelerator, "device_index", side_effect=lambda _: nullcontext()))
        stack.enter_context(recorded(watch.launched))
        watch.fake = stack.enter_context(FakeTensorMode()).from_tensor
        stack.enter_context(_Watching(watch))
        # Backward in this thread: fake tensors and watches do not follow into others.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        with suppress(FakeTensorDeviceMismatchError):  # is among the findings
            yield watch


class _Watching(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        device = self.watch.device_type
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name.startswith("prim::"):  # asks what a tensor is
            return func(*args, **kwargs)
        if self.watch.is_paused:
            answer = self._assumed(name, args, kwargs)
            return func(*args, **kwargs) if answer is None else answer
        on_device = any(tensor.device.type == device for tensor in tensors)
        if on_device and name.startswith("ninerank::"):
            return self._own(name, args, kwargs)
        if on_device and self._is_implicit(func, name):
            with self:
                return func.decompose(*args, **kwargs)
        out = self._assumed(name, args, kwargs)
        if out is None:
            try:
                out = func(*args, **kwargs)
            except FakeTensorDeviceMismatchError:
                self._mixed(name, tensors)
                raise
        if on_device or any(leaf.device.type == device for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.watch.operators[name] += 1
            self._check_places(name, tensors, out)
            self._check_kernel(func, name, args, kwargs)
        return out

    def _is_implicit(self, func: Any, name: str) -> bool:
        """Whether torch composes it before a device is asked: always outside operators, and here in those that Ninerank's call."""
        has_own = torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1") if self.watch.device_type == "npu" else False
        return func._can_decompose() and not has_own

    def _own(self, name: str, args: Any, kwargs: Any) -> Any:
        """Run the host code of the operator's kernel in its place."""
        self.watch.own[name] += 1
        with self:
            return OPDEFS[name]._init_fn(*args, **kwargs)

    def _assumed(self, name: str, args: Any, kwargs: Any) -> Any:
        """An answer where it depends on values, which fake tensors have none of; None elsewhere."""
        if name == "aten::_local_scalar_dense":
            (tensor,) = args
            if tensor.dtype is torch.bool:
                return True
            return 1.0 if tensor.dtype.is_floating_point else self.watch.longest
        if name == "aten::unique_consecutive":
            half = args[0].new_empty(max(1, args[0].numel() // 2))
            return half, args[0].new_empty(0, dtype=torch.int64), half.to(torch.int64)
        if name in ("aten::repeat_interleave.Tensor", "aten::repeat_interleave.self_Tensor") and kwargs.get("output_size") is None:
            return args[0].new_empty(2 * args[0].numel())
        return None

    def _check_places(self, name: str, tensors: list[Tensor], out: Any) -> None:
        watch, device = self.watch, self.watch.device_type
        places = [tensor.device.type for tensor in tensors]
        if name in READS:
            if _is_allowed_read():
                watch.reads += 1
            else:
                watch.find(f"the host waits for the device: {name}")
        elif name in COPIES:
            to, source = (places[0], places[1]) if name == "aten::copy_" else (out.device.type, places[0])
            if source == device != to:
                watch.find(f"copy from {device} to {to}: {name}")
            elif source != device:
                watch.copies_in += 1
        elif any(tensor.device.type != device and tensor.dim() > 0 for tensor in tensors):
            self._mixed(name, tensors)

    def _mixed(self, name: str, tensors: list[Tensor]) -> None:
        self.watch.find(f"tensors of {' and '.join(sorted({tensor.device.type for tensor in tensors}))} in {name}")

    def _check_kernel(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if self.watch.device_type != "npu":  # a build of torch without CUDA does not know CUDA's kernels
            return
        kind = _kernel_kind(name)
        if kind == "composed":
            self.watch.composed.add(name)
        for lacking in _lacking(func, name, args, kwargs):
            self.watch.find(f"no npu kernel, torch_npu would run it on the host: {lacking}" + (f" (of {name})" if lacking != name else ""))


class _Parts(TorchDispatchMode):
    """Collects what a composed operator calls that torch_npu would run on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.lacking: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if not name.startswith("prim::"):
            self.lacking += _lacking(func, name, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@cache
def _kernel_kind(name: str) -> str:
    """What the dispatcher runs for an npu tensor: `own` kernel, `composed` of others, or the `fallback` on the host."""
    (line,) = (line for line in torch._C._dispatch_dump_table(name).splitlines() if line.startswith("PrivateUse1:"))
    if line.endswith("[kernel]"):
        return "own"
    return "fallback" if line.endswith("[backend fallback]") else "composed"


_composed_of: dict[str, list[str]] = {}


def _lacking(func: Any, name: str, args: Any, kwargs: Any) -> list[str]:
    """Operators without an npu kernel that `func` needs; looked up once an operator."""
    kind = _kernel_kind(name)
    if kind != "composed":
        return [name] if kind == "fallback" else []
    if name not in _composed_of:
        _composed_of[name] = []  # one that comes back to itself (detach) asks no second time
        key = next(key for key in COMPOSITE if torch._C._dispatch_has_kernel_for_dispatch_key(name, key))
        with _Parts() as parts:
            func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
        _composed_of[name] = parts.lacking
    return _composed_of[name]


def _name(func: Any) -> str:
    schema = func._schema
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_allowed_read() -> bool:
    return any((Path(frame.f_code.co_filename).name, frame.f_code.co_name) in ALLOWED_READS for frame in _frames())


def _our_line() -> str:
    for frame in _frames():
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.name not in HARNESS and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
    return "a backward pass"
