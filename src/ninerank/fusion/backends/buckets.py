"""A few shapes for devices that record what they run: sizes are rounded up, inputs padded, and the scores of the padding cut off.

    256 candidates and a history of 37 ids        run as 256 and 48
    1 request stays one; 0 rows stay none

Padded candidates are rows of zeros that belong to the first request, padded places of a history are masked: a row's score depends on no
other row, so that nothing is lost but the work. Rounding is to powers of two and the numbers halfway between: half more work at most.
"""

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ninerank.fusion.capture import REQUESTS, ROWS, GraphInput

__all__ = ["MOST_SHAPES", "Bucketed", "bucket"]

log = logging.getLogger(__name__)

Run = Callable[..., Tensor]

# Recorded graphs hold memory of their own, so that there is a bound on them.
MOST_SHAPES = 128


def bucket(size: int) -> int:
    """The smallest size at least `size` that shapes are rounded to.

    >>> [bucket(size) for size in (0, 1, 2, 5, 9, 33, 200, 256)]
    [1, 1, 2, 6, 12, 48, 256, 256]
    """
    power = 1 << max(size - 1, 0).bit_length()
    halfway = power - power // 4
    return halfway if size <= halfway else power


class Bucketed:
    """Runs inputs of any size in few shapes. inputs: of the graph, in calling order.

    record: called once a shape with padded inputs, returns what runs such; it need not be safe for threads, calls are one at a time.
    plain: what runs shapes beyond the bound, and those that cannot be recorded, which the log says.
    """

    def __init__(self, inputs: Sequence[GraphInput], record: Callable[[tuple[Tensor, ...]], Run], plain: Run) -> None:
        self._inputs, self._record, self._plain = tuple(inputs), record, plain
        self._runs: dict[tuple[int, ...], Run] = {}
        self._lock = threading.Lock()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Sizes that were recorded so far."""
        return tuple(self._runs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        sizes: dict[str, int] = {}
        for given, tensor in zip(self._inputs, inputs, strict=True):
            sizes.update({dim: size for dim, size in zip(given.dims, tensor.shape, strict=True) if isinstance(dim, str)})
        rows = sizes.get(ROWS, sizes.get(REQUESTS, 0))
        if not rows:
            return self._plain(*inputs)
        rounded = {name: bucket(size) for name, size in sizes.items()}
        key = tuple(rounded.values())
        with self._lock:
            run = self._runs.get(key)
            if run is None and len(self._runs) >= MOST_SHAPES:
                return self._plain(*inputs)
            padded = tuple(_padded(tensor, given.shape(rounded)) for given, tensor in zip(self._inputs, inputs, strict=True))
            if run is None:
                run = self._runs[key] = self._recorded(padded, rounded)
            return run(*padded)[:rows]

    def _recorded(self, padded: tuple[Tensor, ...], sizes: dict[str, int]) -> Run:
        try:
            return self._record(padded)
        except Exception as error:  # noqa: BLE001 - drivers and compilers fail in any way, and there is a slower one
            shape = ", ".join(f"{name} {size}" for name, size in sizes.items())
            first_line = next(iter(str(error).strip().splitlines()), "")
            log.warning("shape (%s) cannot be recorded and runs launch by launch, slower (%s: %s)", shape, type(error).__name__, first_line)
            return self._plain


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape == shape:
        return tensor
    out = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out
