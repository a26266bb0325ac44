"""Training steps and predictor's forwards on a device that is not there, by the code that runs where it is.

The step is `Trainer.step` itself, on a model built on the device; the forward is the engine's: lookup of a rank call, graph of the
bundle before and after the compiler, sigmoid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from launches import recorded
from models import SPEC, batch, models
from torch import Tensor, nn
from tracing import Watch, watching

from ninerank.device import BACKENDS as COLLECTIVES
from ninerank.device import Device
from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.quantize import QuantizedTable, TableDtype, quantize, stored_dtype
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.fusion.backends import AUTOMATIC, BACKENDS, buckets, lower
from ninerank.fusion.capture import capture
from ninerank.fusion.compile import PassRecord, compile_graph, graph_for_one
from ninerank.predictor.graph import DenseGraph, build_graph, describe_graph
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import ModelConfig, build_model
from ninerank.towers.sides import SidedTower, graph_inputs
from ninerank.training.loss import check_task_weights
from ninerank.training.optimizer import ModelOptimizer
from ninerank.training.processes import Processes
from ninerank.training.recipe import Recipe
from ninerank.training.trainer import Progress, Trainer

__all__ = ["Served", "Step", "forward", "graph_mode", "served", "steps", "train"]

ROWS, REQUESTS = 64, 4


@dataclass(frozen=True)
class Step:
    """What is traced: a model and a recipe's settings. longest: entries of the row that a batch has most of."""

    name: str
    model: ModelConfig
    settings: dict[str, Any]
    longest: int = 3


def steps() -> Iterator[Step]:
    """Every model by the usual optimizers, and every optimizer, precision and embedding mode by one model that has it all."""
    for name, config in models():
        yield Step(name, config, {})
    whole = next(config for name, config in models() if name == "din")
    for kind in ("adamw", "sgd", "adagrad"):
        yield Step(f"din, tower by {kind}", whole, {"optimizer": {"kind": kind, "momentum": 0.9 if kind == "sgd" else 0.0}})
    for kind in ("sgd", "adagrad", "adam", "ftrl"):
        yield Step(f"din, tables by {kind}", whole, {"optimizer": {"sparse": {"kind": kind}}})
    limits = {"weight_decay": 0.01, "max_gradient": 1.0, "max_row_norm": 1.0, "table_lr": {"item": 0.1}}
    yield Step("din, rows limited, long segments", whole, {"optimizer": {"sparse": limits}}, longest=100)
    yield Step("din, clipped by norm", whole, {"schedule": {"clip_norm": 1.0}})
    yield Step("din, bf16", whole, {"precision": "bf16"})
    yield Step("din, sequences padded to their max", whole, {"embedding": {"sequence_length": "max"}})
    yield Step("din, dense tables", whole, {"embedding": {"mode": "dense", "l2": 1e-5}})
    yield Step("din, weighted tasks", whole, {"loss": {"task_weights": {"buy": 2.0}}})


def train(step: Step, device_type: str, change: Callable[[nn.Module], nn.Module] = lambda tower: tower) -> Watch:
    """One step, traced; `change` may put another tower in the model's place."""
    settings = {"data": {"train": "-", "valid": "-"}, "spec": SPEC.model_dump(), "model": step.model.model_dump(), **step.settings}
    recipe = Recipe.parse(settings, "recipe")
    host = batch(ROWS)
    with watching(device_type, longest=step.longest) as watch:
        with watch.paused(), torch.device(device_type, 0):  # Module.to cannot move fake parameters
            model = build_model(recipe.model, SPEC, recipe.embedding, seed=0)
            model.tower = change(model.tower)
        with watch.paused():
            trainer = _trainer(recipe, model.train(), device_type)
        trainer.step(tree_of(host, watch.fake))
    return watch


@dataclass(frozen=True)
class Served:
    """A model as a bundle holds it. graphs: before the compiler and after. dims: of the groups of tables. names: of the graph's inputs."""

    graphs: tuple[DenseGraph, DenseGraph]
    records: tuple[PassRecord, ...]
    dims: dict[str, int]
    names: tuple[str, ...]
    sides: Callable[[int, int], dict[str, Tensor]]


@cache
def served(name: str) -> Served:
    """The model of this name; compiled once, which takes seconds."""
    config = dict(models())[name]
    groups, sequences = tuple(config.groups(len(SPEC.labels))), SPEC.sequence_keys("request")
    model = build_model(config, SPEC, EmbeddingConfig(), seed=0).eval()

    def sides(num_rows: int, num_requests: int) -> dict[str, Tensor]:
        """On the host."""
        with torch.no_grad():
            return model.embedding.sides(batch(num_rows, num_requests=num_requests))

    inputs = graph_inputs(sides(ROWS, REQUESTS), sequences)
    source = capture(SidedTower(model.tower, groups, sequences).eval(), inputs)
    compiled = compile_graph(source)
    dims = {own: group.dim for own, group in model.embedding.named_groups()}
    graphs = (describe_graph(source), describe_graph(compiled.module))
    return Served(graphs, compiled.records, dims, tuple(given.name for given in inputs), sides)


def forward(name: str, device_type: str, tables: TableDtype = "fp32") -> Watch:
    """The predictor's forward of rank calls over tables of a type: the graph as captured, as compiled, and as compiled for one request,
    each as the device's backend prepares it."""
    own, device = served(name), torch.device(device_type, 0)
    rows = sum(table.num_rows for table in SPEC.tables.values())
    stored = {group: quantize(torch.zeros(1, dim), stored_dtype(tables, dim)) for group, dim in own.dims.items()}
    many, single = batch(ROWS, num_requests=REQUESTS), batch(ROWS, num_requests=1)
    with watching(device_type) as watch, torch.no_grad():
        with watch.paused():
            source, compiled = (build_graph(replace(graph, weights=_faked(graph.weights, watch)), device) for graph in own.graphs)
            one = graph_for_one(compiled, own.records)
            with device:
                storage = {
                    group: torch.empty(rows, table.storage_VS.shape[1], dtype=table.storage_VS.dtype) for group, table in stored.items()
                }
                held = {
                    group: storage[group] if table.dtype == "fp32" else QuantizedTable(table.dtype, table.dim, storage[group])
                    for group, table in stored.items()
                }
                collection = EmbeddingCollection.of_tables(SPEC, held, EmbeddingConfig()).eval()
        for host, graphs in ((many, (source, compiled)), (single, (one,))):
            sides = collection.sides(tree_of(host, watch.fake).to(device))
            for graph in graphs:
                ready = BACKENDS[AUTOMATIC[device_type]].prepare(graph, "fp32", graph is one)
                torch.sigmoid(ready(*[sides[name] for name in own.names]).to(torch.float32))
    return watch


def graph_mode(name: str) -> str:
    """The engine's graph of a model on `npu`, over the stand-in of its driver: bound by the automatic backend, compiled and recorded for
    each of a few shapes by the real npugraph_ex, replayed; returns what was seen."""
    own, device = served(name), torch.device("npu", 0)
    compiled = build_graph(own.graphs[1], device)
    unrecorded: list[str] = []
    with recorded(lambda launch, tensors: None), mock.patch.object(buckets.log, "warning", lambda text, *a: unrecorded.append(text % a)):
        runner = lower(compiled, device, one=graph_for_one(compiled, own.records))
        assert runner.backend == "npugraphs", f"{runner.backend} runs it: see the log"
        with torch.inference_mode():
            for num_rows, num_requests in ((ROWS, 1), (ROWS, 1), (ROWS, REQUESTS)):
                sides = own.sides(num_rows, num_requests)
                logits = runner(*[sides[given.name].to(device) for given in runner.inputs])
                assert logits.shape == (num_rows, len(SPEC.labels)), logits.shape
    assert not unrecorded, "\n".join(unrecorded)
    shapes = [*runner._run.shapes, *runner._run_one.shapes]
    assert len(shapes) == 2, shapes
    return f"recorded for {len(shapes)} shapes of sizes {' and '.join(str(shape) for shape in shapes)}, 3 calls"


def _faked(tensors: dict[str, Tensor], watch: Watch) -> dict[str, Tensor]:
    return {name: watch.fake(tensor) for name, tensor in tensors.items()}


def _trainer(recipe: Recipe, model: RankingModel, device_type: str) -> Trainer:
    """A trainer that can take a step and nothing else: no run directory, no data."""
    trainer = Trainer.__new__(Trainer)
    trainer.device = Device(f"{device_type}:0", torch.device(device_type, 0), COLLECTIVES[device_type], torch.bfloat16, "traced")
    trainer.recipe, trainer.processes, trainer.progress = recipe, Processes(), Progress()
    trainer.model, trainer.optimizer = model, ModelOptimizer(model.tower, model.embedding, recipe.optimizer)
    if trainer.optimizer.dense is not None:
        # torch takes the operators on whole lists of parameters where it knows the device, but does not know fake tensors.
        for group in trainer.optimizer.dense.param_groups:
            group["foreach"] = True
    trainer._forward = model
    trainer._task_weights = check_task_weights(recipe.loss, SPEC.labels)
    trainer._total_steps = 100
    return trainer


def tree_of(batch: Batch, fake: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor faked, still on the host."""

    def ids(own: KeyedJagged) -> KeyedJagged:
        return replace(own, values=fake(own.values), lengths=None if own.lengths is None else fake(own.lengths))

    def block(own: Block) -> Block:
        return Block(ids(own.single), ids(own.bags), ids(own.sequences), fake(own.dense_RF))

    rest = {name: getattr(batch, name) for name in ("user_row_B", "label_BT", "weight_B")}
    given = {name: fake(tensor) for name, tensor in rest.items() if tensor is not None}
    return replace(batch, request=block(batch.request), item=block(batch.item), **given)
