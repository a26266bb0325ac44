"""Records launches of Triton kernels in place of running them: which kernel, for which types and constants, on how many programs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["Launch", "recorded"]

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """kernel: the Triton function. signature: argument -> Triton type; constants: values of the tl.constexpr arguments."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    programs: tuple[int, ...]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def variant(self) -> tuple[Any, ...]:
        """What a compiler sees of it."""
        return self.name, self.signature, self.constants


@contextmanager
def recorded(take: Callable[[Launch, list[Tensor]], None]) -> Iterator[None]:
    """Hand every launch inside to `take`, with its tensors, and run none."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        bound = {**dict(zip(names, args, strict=False)), **{key: value for key, value in kwargs.items() if key in names}}
        constants = {names[i] for i in kernel.constexprs} if hasattr(kernel, "constexprs") else set()
        missing = [name for name in names if name not in bound]
        if missing:
            raise TypeError(f"{kernel.fn.__name__} is launched without {', '.join(missing)}")
        if callable(grid):
            grid = grid(bound)
        signature = tuple((name, _type_of(value)) for name, value in bound.items() if name not in constants)
        launch = Launch(kernel, signature, tuple((name, bound[name]) for name in names if name in constants), tuple(grid))
        take(launch, [value for value in bound.values() if isinstance(value, Tensor)])

    with mock.patch.object(JITFunction, "run", run):
        yield


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if abs(value) <= MAX_INT32 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot go into a kernel")
