"""Training steps and predictor's forwards on a device that is not there, by the code that runs where it is.

The step is `Trainer.step` itself, on a model built on the device; the forward is the engine's: lookup of a rank call, graph of the
bundle before and after the compiler, sigmoid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import SPEC, batch, models
from torch import Tensor, nn
from tracing import Watch, watching

from ninerank.device import BACKENDS, Device
from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.fusion.capture import capture
from ninerank.fusion.compile import compile_graph
from ninerank.predictor.graph import build_graph, describe_graph
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import ModelConfig, build_model, model_names
from ninerank.towers.sides import SidedTower, graph_inputs
from ninerank.training.loss import check_task_weights
from ninerank.training.optimizer import ModelOptimizer
from ninerank.training.processes import Processes
from ninerank.training.recipe import Recipe
from ninerank.training.trainer import Progress, Trainer

__all__ = ["Step", "forward", "steps", "train"]

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


def forward(name: str, config: ModelConfig, device_type: str) -> Watch:
    """The predictor's forward of a rank call: the graph as captured and, of models in their usual form, as compiled for a bundle."""
    host = batch(ROWS, num_requests=REQUESTS)
    embedding, groups = EmbeddingConfig(), tuple(config.groups(len(SPEC.labels)))
    model = build_model(config, SPEC, embedding, seed=0).eval()
    sequences = SPEC.sequence_keys("request")
    inputs = graph_inputs(model.embedding.sides(host), sequences)
    source = capture(SidedTower(model.tower, groups, sequences).eval(), inputs)
    graphs = [describe_graph(source)]
    if device_type == "npu" and name in model_names():  # compiling takes seconds
        graphs.append(describe_graph(compile_graph(source).module))
    device = torch.device(device_type, 0)
    with watching(device_type) as watch, torch.no_grad():
        with watch.paused():
            built = [build_graph(replace(graph, weights=_faked(graph.weights, watch)), device) for graph in graphs]
            with device:
                tables = {name: torch.empty(model.embedding.layout.total_rows, group.dim) for name, group in model.embedding.named_groups()}
                collection = EmbeddingCollection.of_tables(SPEC, tables, embedding).eval()
        sides = collection.sides(tree_of(host, watch.fake).to(device))
        for graph in built:
            torch.sigmoid(graph(*[sides[given.name] for given in inputs]).to(torch.float32))
    return watch


def _faked(tensors: dict[str, Tensor], watch: Watch) -> dict[str, Tensor]:
    return {name: watch.fake(tensor) for name, tensor in tensors.items()}


def _trainer(recipe: Recipe, model: RankingModel, device_type: str) -> Trainer:
    """A trainer that can take a step and nothing else: no run directory, no data."""
    trainer = Trainer.__new__(Trainer)
    trainer.device = Device(f"{device_type}:0", torch.device(device_type, 0), BACKENDS[device_type], torch.bfloat16, "traced")
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
