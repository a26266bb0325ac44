"""Whether a changed graph still gives the scores of the graph it was made from.

Both run on the golden batches given and on random ones of several sizes: one request and many, one candidate and many, histories of
one id and of many, empty masks among them. Exact scores are those of the source graph in double precision; the changed graph may be as
far from them as `TOLERANCE`, or as twice the rounding of the source graph itself where that is more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ninerank.fusion.capture import REQUESTS, ROWS, GraphInput, inputs_of
from ninerank.fusion.editor import size_names
from ninerank.fusion.roles import USER_ROW

__all__ = ["TOLERANCE", "Verifier", "draw_inputs"]

TOLERANCE = 1e-6
# Requests, candidates and length of the random batches.
RANDOM_SIZES = ((1, 1, 1), (1, 9, 4), (3, 8, 5), (5, 2, 3))

Inputs = Mapping[str, Tensor]


def draw_inputs(
    inputs: Sequence[GraphInput], sizes: Mapping[str, int], draw: torch.Generator, like: Inputs | None = None
) -> dict[str, Tensor]:
    """Random tensors for a graph; numbers have mean and deviation of `like`, a batch of the same inputs, or 0 and 0.5.

    Masks keep the first places of a row, none and all among them.
    """
    drawn: dict[str, Tensor] = {}
    for given in inputs:
        shape = given.shape(sizes)
        if given.name == USER_ROW:
            drawn[given.name] = torch.randint(0, sizes[REQUESTS], shape, generator=draw)
        elif given.dtype == torch.bool:
            kept = torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=draw)
            drawn[given.name] = torch.arange(shape[-1]) < kept
        else:
            known = like.get(given.name) if like is not None else None
            is_known = known is not None and known.numel() > 1
            mean, deviation = (float(known.mean()), float(known.std())) if is_known and known is not None else (0.0, 0.5)
            drawn[given.name] = (torch.randn(shape, generator=draw) * deviation + mean).to(given.dtype)
    return drawn


class Verifier:
    """Compares graphs with a source graph on fixed batches. examples: golden batches by input name."""

    def __init__(self, source: fx.GraphModule, examples: Sequence[Inputs] = (), *, seed: int = 0) -> None:
        inputs = inputs_of(source)
        draw = torch.Generator().manual_seed(seed)
        self.batches: list[Inputs] = [{given.name: example[given.name] for given in inputs} for example in examples]
        like = self.batches[0] if self.batches else None
        for requests, rows, length in RANDOM_SIZES:
            lengths = {name: length + place for place, name in enumerate(size_names(source)[2:])}
            self.batches.append(draw_inputs(inputs, {REQUESTS: requests, ROWS: rows, **lengths}, draw, like))
        self.exact = [_run(source, batch, double=True) for batch in self.batches]
        self.rounding = max(_difference(_run(source, b), exact) for b, exact in zip(self.batches, self.exact, strict=True))

    @property
    def allowed(self) -> float:
        return max(TOLERANCE, 2 * self.rounding)

    def difference(self, changed: fx.GraphModule, *, one_request: bool = False) -> float:
        """Largest difference of a score from the exact one; with `one_request` on the batches that have one."""
        pairs = zip(self.batches, self.exact, strict=True)
        return max(_difference(_run(changed, b), exact) for b, exact in pairs if not one_request or _num_requests(changed, b) == 1)


def _num_requests(module: fx.GraphModule, batch: Inputs) -> int:
    """Rows of the request side; 1 for a graph that reads nothing of it."""
    sizes = {batch[given.name].shape[0] for given in inputs_of(module) if given.role == "request"}
    return sizes.pop() if sizes else 1


def _difference(logits: Tensor, exact: Tensor) -> float:
    """Largest difference of two scores; what is no number is infinitely far from what is."""
    if logits.shape != exact.shape:
        return float("inf")
    if logits.numel() == 0:
        return 0.0
    difference = (torch.sigmoid(logits.double()) - torch.sigmoid(exact.double())).abs()
    same = torch.isnan(logits) & torch.isnan(exact)
    return float(torch.where(same, 0.0, difference.nan_to_num(nan=float("inf"))).max())


def _run(module: fx.GraphModule, batch: Inputs, *, double: bool = False) -> Tensor:
    tensors = [batch[given.name] for given in inputs_of(module)]
    with torch.inference_mode():
        result: Tensor = _Double(module).run(*map(_doubled, tensors)) if double else module(*tensors)
    return result


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


class _Double(fx.Interpreter):
    """Runs a graph of float32 in float64."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _doubled(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return super().call_function(target, tuple(map(wider, args)), {name: wider(value) for name, value in kwargs.items()})
