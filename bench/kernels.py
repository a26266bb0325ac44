"""Training steps that use the fused operators against the same steps in plain torch.

A step is lookup, tower, loss, backward and both updates, on one thread or as many as `--threads` says. Both sides have the same model,
start from the same values and get the same batches; loss, logits and gradients are compared before anything is timed, and the steps are
timed in turns.

    din_train_vs_padded        DIN over histories of Zipf lengths (mean 20, at most 100): padded plain torch / jagged
    din_relu_train_vs_padded   the same with the cheap activation instead of Dice
    dcnv2_train_vs_plain       DCN V2 with low-rank crosses: plain torch / fused
    hstu_train_vs_padded       forward and backward of an HSTU layer over such histories: padded plain torch / jagged

    python bench/kernels.py
"""

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from harness import Result, interleave
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.embedding.optimizer import SparseOptimizerConfig, sparse_optimizer
from ninerank.features.batch import Batch
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform
from ninerank.towers.blocks import fused
from ninerank.towers.blocks.hstu import HSTULayer
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model

BATCH_SIZE, NUM_BATCHES, DIM = 2048, 4, 16
NUM_ITEMS, NUM_FIELDS, FIELD_IDS = 100_000, 10, 10_000
MEAN_LENGTH, MAX_LENGTH = 20, 100
CROSS_FIELDS, RANK = 26, 64
TOLERANCE = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=("din", "dcnv2", "hstu"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = {
        "threads": options.threads,
        "batch": BATCH_SIZE,
        "dim": DIM,
        "fields": NUM_FIELDS + 1,
        "history_mean": MEAN_LENGTH,
        "history_max": MAX_LENGTH,
        "cross_fields": CROSS_FIELDS,
        "rank": RANK,
    }
    with Result("kernels", shapes) as result:
        if options.only in (None, "din"):
            _compare(result, "din_train_vs_padded", _din("dice"), options.rounds)
            _compare(result, "din_relu_train_vs_padded", _din("relu"), options.rounds)
        if options.only in (None, "dcnv2"):
            _compare(result, "dcnv2_train_vs_plain", _dcnv2(), options.rounds)
        if options.only in (None, "hstu"):
            _compare(result, "hstu_train_vs_padded", _hstu(), max(options.rounds // 5, 3))


class Step:
    """One training step of a model over batches in turn. inside: what the step runs within."""

    def __init__(self, spec: FeatureSpec, batches: list[Batch], model: dict[str, Any], inside: Any = nullcontext, **embedding: Any) -> None:
        self.model = build_model(parse_model(model), spec, EmbeddingConfig(**embedding), seed=1)
        self.dense = torch.optim.Adam(self.model.tower.parameters(), lr=1e-3, fused=True)
        self.sparse = sparse_optimizer(self.model.embedding, SparseOptimizerConfig())
        self.batches, self.turn, self.inside = batches, cycle(batches), inside

    def __call__(self) -> None:
        self.backward(next(self.turn))
        self.dense.step()
        self.sparse.step()

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, with gradients left in the parameters and the tables."""
        self.dense.zero_grad()
        self.sparse.zero_grad()
        with self.inside():
            logits_BT = self.model(batch)
            assert batch.label_BT is not None
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits_BT, batch.label_BT)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), logits_BT.detach()

    def checked(self) -> list[Tensor]:
        """Loss, logits, gradients, and the tables after one step."""
        found = [*self.backward(self.batches[0]), *(p.grad.clone() for p in self.model.tower.parameters() if p.grad is not None)]
        self()
        return [*found, *(group.storage.detach() for _, group in self.model.embedding.named_groups())]


class HSTUStep:
    """Forward and backward of one HSTU layer over histories, jagged or padded."""

    def __init__(self, *, is_jagged: bool) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layer = HSTULayer(DIM, num_heads=2, qk_dim=DIM, value_dim=DIM, max_length=MAX_LENGTH)
            lengths_B = torch.from_numpy(_lengths(np.random.default_rng(1)))
            self.mask_BL = torch.arange(MAX_LENGTH) < lengths_B[:, None]
            self.x_BLD = torch.randn(BATCH_SIZE, MAX_LENGTH, DIM)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
        self.is_jagged = is_jagged
        self.x_ND = self.x_BLD[self.mask_BL]

    def __call__(self) -> Tensor:
        self.layer.zero_grad()
        out = self.layer.jagged(self.x_ND, self.offsets) if self.is_jagged else self.layer(self.x_BLD, self.mask_BL)
        out.square().sum().backward()
        return out.detach()

    def checked(self) -> list[Tensor]:
        """Outputs of the positions that there are, and gradients."""
        out = self()
        return [out if self.is_jagged else out[self.mask_BL], *(p.grad.clone() for p in self.layer.parameters() if p.grad is not None)]


def _hstu() -> dict[str, HSTUStep]:
    return {"hstu_jagged": HSTUStep(is_jagged=True), "hstu_padded": HSTUStep(is_jagged=False)}


def _compare(result: Result, ratio: str, sides: Mapping[str, Step | HSTUStep], rounds: int) -> None:
    (ours, mine), (theirs, other) = sides.items()
    for one, two in zip(mine.checked(), other.checked(), strict=True):
        scale = float(two.abs().max()) + 1e-6
        assert float((one - two).abs().max()) <= TOLERANCE * scale, f"{ratio}: the two steps differ"
    times = interleave({ours: mine, theirs: other}, rounds)
    result.timings(times)
    result.ratio(ratio, times[theirs].p50_ms / times[ours].p50_ms)


def _din(activation: str) -> dict[str, Step]:
    spec, batches = _data(NUM_FIELDS, with_history=True)
    mlp = {"hidden": [200, 80], "activation": activation}
    model = {"name": "din", "embedding_dim": DIM, "attention_activation": activation, "mlp": mlp}
    name = "din" if activation == "dice" else f"din_{activation}"
    return {
        f"{name}_jagged": Step(spec, batches, model, sequence_length="jagged"),
        f"{name}_padded": Step(spec, batches, model, _plain),
    }


def _dcnv2() -> dict[str, Step]:
    spec, batches = _data(CROSS_FIELDS - 1, with_history=False)
    model = {"name": "dcnv2", "embedding_dim": DIM, "cross_layers": 3, "low_rank": RANK, "mlp": {"hidden": [400, 400]}}
    return {"dcnv2_fused": Step(spec, batches, model), "dcnv2_plain": Step(spec, batches, model, _plain)}


def _plain() -> AbstractContextManager[object]:
    """Plain torch in place of the fused operators of towers."""
    return mock.patch.object(fused, "takes_operator", return_value=False)


def _data(num_fields: int, *, with_history: bool) -> tuple[FeatureSpec, list[Batch]]:
    """A fitted spec and a few batches of it: single ids, and a history of the item with lengths drawn from a Zipf law."""
    encoding = {"kind": "hashed", "num_buckets": FIELD_IDS}
    features: list[dict[str, Any]] = [
        {"name": f"f{i}", "kind": "id", "role": "user" if i % 2 else "item", "dtype": "int64", "encoding": encoding}
        for i in range(num_fields)
    ]
    features.append(
        {"name": "item", "kind": "id", "role": "item", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": NUM_ITEMS}}
    )
    if with_history:
        features.append({"name": "history", "kind": "sequence", "role": "user", "of": "item", "max_length": MAX_LENGTH})
    spec = FeatureSpec.parse({"labels": ["click"], "features": features}, "spec")
    rng, transform = np.random.default_rng(1), Transform(spec)
    return spec, [transform.batch(_rows(rng, num_fields, with_history=with_history)) for _ in range(NUM_BATCHES)]


def _rows(rng: np.random.Generator, num_fields: int, *, with_history: bool) -> pa.RecordBatch:
    columns: dict[str, Any] = {"click": rng.integers(0, 2, BATCH_SIZE), "item": rng.integers(0, NUM_ITEMS, BATCH_SIZE)}
    columns.update({f"f{i}": rng.integers(0, FIELD_IDS, BATCH_SIZE) for i in range(num_fields)})
    if with_history:
        columns["history"] = [rng.integers(0, NUM_ITEMS, length).tolist() for length in _lengths(rng)]
    return pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})


def _lengths(rng: np.random.Generator) -> "np.ndarray[Any, Any]":
    """Lengths 1 ... MAX_LENGTH with P(l) ~ l^-s, s such that their mean is MEAN_LENGTH."""
    each = np.arange(1, MAX_LENGTH + 1)
    low, high = 0.0, 3.0
    for _ in range(50):
        exponent = (low + high) / 2
        weight = each**-exponent
        low, high = (exponent, high) if (weight * each).sum() > MEAN_LENGTH * weight.sum() else (low, exponent)
    weight = each**-low
    return rng.choice(each, BATCH_SIZE, p=weight / weight.sum())


if __name__ == "__main__":
    main()
