"""A model over the processes of a run: tables laid out by plan, a tower that is copied, gradients as of one process.

Shape legend: B rows of this process, T tasks, W processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from ninerank.device import Device
from ninerank.embedding.sharding import Machine, Plan
from ninerank.embedding.sharding.tables import check_sharding, shard_tables, tables_apart
from ninerank.errors import SpecError
from ninerank.features.batch import Batch
from ninerank.features.spec import FeatureSpec
from ninerank.towers.model import RankingModel, TowerShape
from ninerank.towers.registry import build_model, build_tower
from ninerank.training.pipeline import fit_spec
from ninerank.training.processes import Processes
from ninerank.training.recipe import Recipe

__all__ = ["agree_on_buffers", "build_for", "machine_of", "plan_for", "tower_averaged"]

TABLES_SHARE = 0.8


def build_for(recipe: Recipe, spec: FeatureSpec, device: Device, processes: Processes) -> RankingModel:
    """The model of a recipe on `device`; with several processes and embedding mode `sparse`, its tables are sharded.

    Start values are those of one process. Raises SpecError and DeviceError for what cannot be sharded.
    """
    groups = recipe.model.groups(len(spec.labels))
    recipe.embedding.check_tables(spec)
    check_sharding(spec, groups, recipe.sharding, processes.world_size, recipe.embedding.tiers)
    if processes.world_size == 1:
        return build_model(recipe.model, spec, recipe.embedding, seed=recipe.seed).to(device.torch_device)
    if recipe.sharding.kernel == "fbgemm" and recipe.schedule.clip_norm is not None:
        raise SpecError("sharding.kernel fbgemm updates tables in the backward pass: no schedule.clip_norm, or take kernel auto")
    if recipe.embedding.mode == "dense":
        return build_model(recipe.model, spec, recipe.embedding, seed=recipe.seed).to(device.torch_device)
    from ninerank.embedding.sharding import ShardedEmbeddingCollection, row_bytes

    tower = build_tower(recipe.model, TowerShape.of(spec), seed=recipe.seed).to(device.torch_device)
    embedding = ShardedEmbeddingCollection(
        spec,
        groups,
        recipe.embedding,
        seed=recipe.seed,
        sharding=recipe.sharding,
        machine=machine_of(recipe, device, processes.world_size, processes.local_world_size),
        device=device.torch_device,
        batch_size=processes.share(recipe.data.batch_size),
        row_bytes=row_bytes(recipe.optimizer.sparse.rule, groups),
    )
    return RankingModel(embedding, tower)


def plan_for(recipe: Recipe, num_processes: int) -> Plan:
    """How the tables of a recipe would lie over that many processes on one host; an unfitted spec is fitted first."""
    from ninerank.embedding.sharding import make_plan, row_bytes

    device = Device.resolve(recipe.device)
    spec = fit_spec(recipe.spec, recipe.data.files("train"), recipe.data)
    groups = recipe.model.groups(len(spec.labels))
    recipe.embedding.check_tables(spec)
    check_sharding(spec, groups, recipe.sharding, num_processes, recipe.embedding.tiers)
    sizes = row_bytes(recipe.optimizer.sparse.rule, groups)
    return make_plan(
        shard_tables(spec, recipe.sharding, recipe.embedding.tiers),
        groups,
        recipe.sharding,
        machine_of(recipe, device, num_processes, num_processes),
        batch_size=-(-recipe.data.batch_size // num_processes),
        row_bytes=sizes,
        apart=tables_apart(spec, groups, sizes, recipe.embedding.tiers),
    )


def machine_of(recipe: Recipe, device: Device, world_size: int, local_world_size: int) -> Machine:
    """What a plan is made for: by default tables may take most of a device, or of a process's share of the host's memory."""
    total = device.memory().total_bytes // (local_world_size if device.kind == "cpu" else 1)
    return Machine(device.kind, world_size, local_world_size, recipe.sharding.memory_bytes or int(total * TABLES_SHARE))


def tower_averaged(model: RankingModel, device: Device, processes: Processes) -> Callable[[Batch], Tensor]:
    """The model's forward (logits (B, T)) whose backward averages dense gradients over all processes."""
    if processes.world_size == 1:
        return model
    ids = None if device.kind == "cpu" else [device.torch_device.index]
    if model.embedding.config.mode == "dense":
        whole: Callable[[Batch], Tensor] = DistributedDataParallel(model, device_ids=ids, forward_sync_buffers=False)
        return whole
    if not any(parameter.requires_grad for parameter in model.tower.parameters()):
        return model
    tower = DistributedDataParallel(model.tower, device_ids=ids, forward_sync_buffers=False)
    return lambda batch: tower(model.embedding(batch))


@torch.no_grad()
def agree_on_buffers(model: RankingModel, processes: Processes) -> None:
    """Give all processes the mean of their running statistics, which each has from its own rows."""
    if processes.world_size > 1:
        for buffer in model.tower.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer.div_(processes.world_size)
