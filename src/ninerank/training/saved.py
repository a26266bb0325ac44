"""What a checkpoint holds of a model and its optimizer, and both filled again from one.

Tables whose state is by id are kept apart, under `managed.<table>`. All others are named alike whether they lie in memory, in tiers or over
several processes, so that what one kind saved every other loads.
"""

from typing import Any

from torch import Tensor

from ninerank.embedding.shard import Shard
from ninerank.towers.model import RankingModel
from ninerank.training.checkpoint import BestWeights, ById, Checkpoint
from ninerank.training.checkpoint.managed import managed_tree, read_managed
from ninerank.training.checkpoint.tree import Tree
from ninerank.training.optimizer import ModelOptimizer
from ninerank.training.state import flatten, restore

__all__ = ["fill", "fill_best", "tensors_of", "weights_of"]


def tensors_of(model: RankingModel, optimizer: ModelOptimizer) -> tuple[dict[str, Tree], Any]:
    """Tensors by section, views where that is possible, and the JSON form of the optimizer."""
    found: dict[str, Any] = {}
    form = flatten(optimizer.state_dict(), "state", found)
    return {"model": model.static_state(), "optimizer": found, **managed_tree(model.embedding.by_id)}, form


def fill(checkpoint: Checkpoint, form: Any, model: RankingModel, optimizer: ModelOptimizer) -> None:
    """Take what `tensors_of` gave; raises CheckpointError where it does not fit."""
    checkpoint.read({"model": model.static_state(reading=True)})
    optimizer.load_state_dict(restore(form, _optimizer_tensors(checkpoint, optimizer)))
    read_managed(checkpoint, model.embedding.by_id)


def _optimizer_tensors(checkpoint: Checkpoint, optimizer: ModelOptimizer) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint, in those it has; of sharded tables each process reads its own blocks."""
    own: dict[str, Any] = {}
    flatten(optimizer.state_dict(reading=True), "state", own)
    shards = {name: value for name, value in own.items() if isinstance(value, Shard)}
    if not shards:
        return checkpoint.section("optimizer", into=own)
    dense = {f"state.dense.{name}": value for name, value in checkpoint.section("optimizer.state.dense").items()}
    checkpoint.read({"optimizer": {**dense, **shards}})
    return dense | {name: shard.tensor for name, shard in shards.items()}


def weights_of(model: RankingModel) -> dict[str, Tree]:
    """What scores, of a model over any number of processes: each names what it holds."""
    weights: dict[str, Any] = {**model.static_state()}
    return weights | {_managed(name): ById(table.values_state()) for name, table in model.embedding.by_id.items()}


def fill_best(best: BestWeights, model: RankingModel) -> None:
    """Take the best weights, as `weights_of` gave them: read into the model without a second copy in memory. Raises CheckpointError."""
    archive = best.open()
    archive.read({"model": model.static_state(reading=True)})
    for name, table in model.embedding.by_id.items():
        table.load_values(archive.by_id(f"model.{_managed(name)}"))


def _managed(table: str) -> str:
    return f"embedding.managed.{table}"
