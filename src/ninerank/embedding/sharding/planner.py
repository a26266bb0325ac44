"""TorchRec's planner: tables, pooling factors and device memory in, a `Plan` out."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ninerank.embedding.sharding.config import ShardingConfig
from ninerank.embedding.sharding.plan import Apart, Machine, Placed, Plan
from ninerank.embedding.sharding.tables import ShardTable, kind_at
from ninerank.errors import DeviceError

if TYPE_CHECKING:
    from ninerank.embedding.sharding.torchrec import Collections

__all__ = ["collections_of", "make_plan"]

FLOAT_BYTES = 4
# Bytes a millisecond. HBM of Ascend 910B: 1.6 TB/s; its links within a host: 392 GB/s (Huawei's figures of the Atlas 800T A2).
ASCEND_HBM, ASCEND_LINK = 1.6e9, 392e6


def collections_of(tables: Sequence[ShardTable], groups: Mapping[str, int]) -> "tuple[Collections, dict[str, tuple[ShardTable, str]]]":
    """TorchRec's modules over the meta device, and which table at which group's dim each of their names stands for."""
    from ninerank.embedding.sharding.torchrec import Collections, Features, table_name

    number = {feature: f"f{i}" for i, feature in enumerate(feature for table in tables for feature in table.features)}
    pooled: list[Features] = []
    unpooled: dict[str, list[Features]] = {}
    names: dict[str, tuple[ShardTable, str]] = {}
    for g, (group, dim) in enumerate(groups.items()):
        for t, table in enumerate(tables):
            each = Features(table_name(g, t), table.num_rows, dim, tuple(number[feature] for feature in table.features))
            names[each.name] = (table, group)
            (pooled if table.is_pooled else unpooled.setdefault(f"g{g}", [])).append(each)
    return Collections(pooled, unpooled), names


def make_plan(
    tables: Sequence[ShardTable],
    groups: Mapping[str, int],
    config: ShardingConfig,
    machine: Machine,
    *,
    batch_size: int,
    row_bytes: Mapping[str, int],
    apart: tuple[Apart, ...] = (),
) -> Plan:
    """Place all tables; the same arguments give the same plan. Without static tables TorchRec is not asked.

    apart: dynamic and tiered tables, which are not placed. batch_size: rows of one process. row_bytes: values and optimizer state of one
    row, by group.
    Raises DeviceError where the tables do not fit.
    """
    if not tables:
        return Plan(machine.world_size, (), apart=apart)
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import PlannerError

    from ninerank.embedding.sharding.torchrec import BestPlan, quiet, sharders

    collections, names = collections_of(tables, groups)
    caught = BestPlan()
    planner = EmbeddingShardingPlanner(
        topology=_topology(machine, _memory_for_values(machine, groups, row_bytes)),
        batch_size=batch_size,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
        constraints={name: _constraints(table, groups[group], config, machine.world_size) for name, (table, group) in names.items()},
        stats=caught,
        debug=False,
    )
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchRec warns of columns that it leaves whole; they are split below
            planner.plan(collections, cast("Any", sharders()))
    except PlannerError as error:
        raise DeviceError(_refusal(tables, machine, row_bytes, error)) from None
    predicted = [0.0] * machine.world_size
    placed: dict[tuple[str, str], Placed] = {}
    for option in caught.options:
        table, group = names[option.name]
        kind = option.sharding_type
        rank = option.shards[0].rank if kind == "table_wise" else None
        placed[table.name, group] = Placed(table.name, group, table.num_rows, groups[group], kind, rank, row_bytes[group])
        for shard in option.shards:
            if kind == "column_wise":
                predicted = [value + shard.perf.total / machine.world_size for value in predicted]
            else:
                predicted[shard.rank] += shard.perf.total
    ordered = tuple(placed[table.name, group] for group in groups for table in tables)
    plan = Plan(machine.world_size, ordered, tuple(predicted), apart)
    _check_memory(plan, machine)
    return plan


def _constraints(table: ShardTable, dim: int, config: ShardingConfig, world_size: int) -> Any:
    from torchrec.distributed.planner import ParameterConstraints

    kind = kind_at(config, table.name, dim)
    kinds: list[str] = [kind]
    if kind == "auto":
        kinds = ["table_wise", "row_wise", "data_parallel"] + (["column_wise"] if dim % (4 * world_size) == 0 else [])
    return ParameterConstraints(sharding_types=kinds, min_partition=max(1, dim // world_size), pooling_factors=list(table.ids_a_row))


def _topology(machine: Machine, memory_bytes: int) -> Any:
    """The planner knows cpu and cuda: Ascend is planned as cuda with its own memory and bandwidths."""
    from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

    hardware = {"ddr_cap_bytes": memory_bytes} if machine.kind == "cpu" else {"hbm_cap_bytes": memory_bytes}
    bandwidth = {"hbm_mem_bw": ASCEND_HBM, "intra_host_bw": ASCEND_LINK} if machine.kind == "npu" else {}
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(world_size=machine.world_size, local_world_size=machine.local_world_size),
        hardware_config=HardwareConfig(**hardware, **bandwidth),
        kernel_config=KernelConfig(compute_device="cpu" if machine.kind == "cpu" else "cuda"),
    )


def _memory_for_values(machine: Machine, groups: Mapping[str, int], row_bytes: Mapping[str, int]) -> int:
    """The planner counts values alone: leave it the share of memory that values take beside the optimizer's state."""
    share = sum(FLOAT_BYTES * dim for dim in groups.values()) / sum(row_bytes[group] for group in groups)
    return int(machine.memory_bytes * share)


def _check_memory(plan: Plan, machine: Machine) -> None:
    for rank in range(plan.world_size):
        if plan.bytes_of(rank) > machine.memory_bytes:
            raise DeviceError(
                f"sharding: process {rank} would hold {plan.bytes_of(rank):,} bytes of tables and optimizer state, "
                f"{machine.memory_bytes:,} are allowed; use more processes, row_wise for the large tables, or set sharding.memory_bytes"
            )


def _refusal(tables: Sequence[ShardTable], machine: Machine, row_bytes: Mapping[str, int], error: Exception) -> str:
    total = sum(table.num_rows for table in tables) * sum(row_bytes.values())
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"sharding: no plan for {total:,} bytes of tables and optimizer state over {machine.world_size} processes of "
        f"{machine.memory_bytes:,} bytes each ({first_line}); use more processes, other kinds in sharding.tables, "
        "or set sharding.memory_bytes"
    )
