"""One side of a comparison: where a bundle runs, and by what.

    cpu    cpu:bf16    cpu:eager    cpu:interpreter    cuda:1:bf16    npu:0:torch

A device, then any of a precision, a backend of the graph and the kernels of operators, in any order. `interpreter` takes Triton's kernels
on the CPU, line by line in its interpreter: the arithmetic that a GPU or an NPU gets, without one.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, fx

from ninerank.device import Device
from ninerank.errors import DeviceError, nearest
from ninerank.features.batch import Batch
from ninerank.fusion.backends import AUTO, BACKENDS, Precision, Runner, lower
from ninerank.fusion.compile import graph_for_one
from ninerank.fusion.kernels import registry
from ninerank.predictor.bundle import Bundle
from ninerank.predictor.engine import lookup_of
from ninerank.predictor.graph import build_graph

__all__ = ["KERNELS", "Place", "PlacedBundle"]

INTERPRETER = "interpreter"
KERNELS = ("numba", "triton", "torch", INTERPRETER)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Place:
    """What a text like `cpu:bf16` names. kernels: None for each operator's own choice.

    >>> Place.parse("cuda:1:bf16:triton")
    Place(text='cuda:1:bf16:triton', device='cuda:1', precision='bf16', backend='auto', kernels='triton')
    >>> Place.parse("cpu:fp16")
    Traceback (most recent call last):
    ...
    ninerank.errors.DeviceError: device 'cpu:fp16': unknown 'fp16'; did you mean 'bf16'? valid: ...
    """

    text: str
    device: str
    precision: Precision = "fp32"
    backend: str = AUTO
    kernels: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Raises DeviceError for a word that is unknown, or one too many of its kind; the device itself is looked up later."""
        device, *words = text.split(":")
        if words and words[0].isdecimal():
            device = f"{device}:{words.pop(0)}"
        kinds: dict[str, tuple[str, ...]] = {"precision": PRECISIONS, "backend": tuple(BACKENDS), "kernels": KERNELS}
        given: dict[str, str] = {}
        for word in words:
            kind = next((kind for kind, names in kinds.items() if word in names), None)
            if kind is None:
                raise DeviceError(f"device {text!r}: unknown {word!r}; {nearest(word, [name for own in kinds.values() for name in own])}")
            if kind in given:
                raise DeviceError(f"device {text!r}: names the {kind} twice, {given[kind]!r} and {word!r}; one is allowed")
            given[kind] = word
        precision = next((own for own in PRECISIONS if own == given.get("precision")), PRECISIONS[0])
        return cls(text, device, precision, given.get("backend", AUTO), given.get("kernels"))


class PlacedBundle:
    """A bundle bound to a place: its lookups, and its graph as it runs there.

    Raises DeviceError for a place that cannot run here, BundleError for a bundle whose graph or tables are malformed.
    """

    def __init__(self, bundle: Bundle, place: Place) -> None:
        self.place = place
        self.device = Device.resolve(place.device)
        self._preferred = _kernel_name(place, self.device)
        self._lookup = lookup_of(bundle, self.device)
        self.graph = build_graph(bundle.graph, self.device.torch_device)
        self.graph_one = graph_for_one(self.graph, bundle.manifest.passes)
        self.runner: Runner = lower(
            self.graph, self.device.torch_device, one=self.graph_one, backend=place.backend, precision=place.precision
        )

    def inputs(self, batch: Batch) -> list[Tensor]:
        """What the graph reads, looked up here for a batch on the host."""
        with self.running():
            sides = self._lookup.sides(batch.to(self.device.torch_device), check=False)
        return [sides[given.name] for given in self.runner.inputs]

    def graphs_for(self, inputs: list[Tensor]) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The bundle's graph for such inputs, and the same as this side's backend runs it."""
        return (self.graph_one, self.runner.graph_one) if self.runner.is_one(inputs) else (self.graph, self.runner.graph)

    def logits(self, inputs: list[Tensor]) -> Tensor:
        """What the backend makes of them."""
        with self.running():
            return self.runner(*inputs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context in which operators take this side's kernels."""
        with torch.inference_mode():
            if self._preferred is None:
                yield
            else:
                with registry.preferring(self._preferred):
                    yield


def _kernel_name(place: Place, device: Device) -> str | None:
    """Name of the kernels in the registry; raises DeviceError where they cannot run."""
    name = "triton" if place.kernels == INTERPRETER else place.kernels
    if place.kernels == INTERPRETER:
        if device.kind != "cpu":
            raise DeviceError(f"device {place.text!r}: Triton's interpreter runs on cpu, on {device.kind} the kernels themselves do")
        _interpret(place)
    operators = registry.operators()
    if name is not None and not any(name in registry.available(operator, device.kind) for operator in operators):
        kinds = {kernel for operator in operators for kernel in registry.available(operator, device.kind)}
        kinds |= {INTERPRETER} if device.kind == "cpu" else set()
        raise DeviceError(f"device {place.text!r}: no kernel {name!r} runs on {device.kind}; {nearest(name, kinds)}")
    return name


def _interpret(place: Place) -> None:
    """Have Triton interpret its kernels, which it decides when it is loaded."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if "triton" in sys.modules:
        raise DeviceError(f"device {place.text!r}: Triton is loaded already and compiles; start this process with TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
