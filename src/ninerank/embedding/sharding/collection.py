"""The embedding collection over several processes: the same inputs to a tower, from tables that lie apart.

Shape legend: B rows of this process, Fd dense features, Fs pooled fields, L sequence length, D embedding dim of a group, N ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig, pooled_keys
from ninerank.embedding.dynamic.state import shard_of
from ninerank.embedding.dynamic.table import DynamicTable
from ninerank.embedding.index import BatchIndex
from ninerank.embedding.managed import TableStatistics
from ninerank.embedding.part import KINDS, real_of
from ninerank.embedding.pooling import Jagged, Padding, pool_rows
from ninerank.embedding.shard import Shard, absent
from ninerank.embedding.sharding.blocks import RowBlocks, shards_of
from ninerank.embedding.sharding.capacity import Everyone
from ninerank.embedding.sharding.config import ShardingConfig
from ninerank.embedding.sharding.dealt import Dealt, DealtRows, DealtTables
from ninerank.embedding.sharding.exchange import global_sum
from ninerank.embedding.sharding.fbgemm import FBGEMM, FbgemmStorage, takes
from ninerank.embedding.sharding.plan import Apart, Machine, Placed, Plan
from ninerank.embedding.sharding.storage import BlockStorage, Held
from ninerank.embedding.sharding.tables import ShardTable, check_sharding, shard_tables, tables_apart
from ninerank.embedding.tiers.table import TieredTable
from ninerank.errors import DataError, NinerankError, SpecError
from ninerank.features.batch import Batch, KeyedJagged
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature
from ninerank.fusion.kernels import registry

__all__ = ["ShardedEmbeddingCollection"]

WIRES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Ids:
    """Ids of one feature of a batch: lengths (B,) of its bags or sequences."""

    values: Tensor
    lengths: Tensor


class ShardedEmbeddingCollection(EmbeddingCollection):
    """Twin of `EmbeddingCollection` whose tables lie over the processes of the default group: static ones as planned, dynamic ones by
    id, tiered ones in blocks of rows.

    Every process calls `prepare`, `forward`, `finish_step` and `table_metrics` alike, with its rows of the global batch, as many as the
    others. Start values, outputs and gradients are those of one process; `managed` holds this process's part of each dynamic and tiered
    table.
    Raises SpecError for what cannot be sharded and DeviceError where the tables do not fit.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        groups: Mapping[str, int],
        config: EmbeddingConfig,
        *,
        seed: int,
        sharding: ShardingConfig,
        machine: Machine,
        device: torch.device,
        batch_size: int,
        row_bytes: Mapping[str, int],
    ) -> None:
        if config.mode != "sparse":
            raise SpecError("sharding needs embedding mode 'sparse'; in mode 'dense' every process keeps all tables")
        check_sharding(spec, groups, sharding, machine.world_size, config.tiers)
        super().__init__(spec, {}, config, seed=seed)
        self.dims = dict(groups)
        self.device = device
        self.kernel = sharding.kernel
        self.storages: list[BlockStorage] = []
        self._tables = shard_tables(spec, sharding, config.tiers)
        apart = tables_apart(spec, groups, row_bytes, config.tiers)
        self.plan = _agreed_plan(self._tables, groups, sharding, machine, apart=apart, batch_size=batch_size, row_bytes=row_bytes)
        self.dealt: DealtTables | None = None
        self._num_rows: dict[str, int] = {}
        self._deal(spec, sharding, seed)
        self._distributed: tuple[Any, ...] = ()
        self._name_in: dict[tuple[str, str], str] = {}
        self._number = {name: f"f{i}" for i, name in enumerate(name for table in self._tables for name in table.features)}
        if self._tables:
            self._distribute(sharding, machine, seed)
        self._pooled = [table for table in self._tables if table.is_pooled]
        self._unpooled = [table for table in self._tables if not table.is_pooled]
        self._fields = pooled_keys(spec)
        static = {name for table in self._tables for name in table.features}
        self._mean = {f.name for f in spec.features if isinstance(f, IdFeature) and f.multi and f.pooling == "mean" and f.name in static}
        self._max_length = {f.name: f.max_length for f in spec.features if isinstance(f, SequenceFeature) and f.name in static}
        self._single = {*spec.single_keys("request"), *spec.single_keys("item")}

    def _distribute(self, sharding: ShardingConfig, machine: Machine, seed: int) -> None:
        """Put the static tables where the plan says."""
        from ninerank.embedding.sharding.planner import collections_of
        from ninerank.embedding.sharding.torchrec import distribute

        collections, names = collections_of(self._tables, self.dims)
        at = {(placed.table, placed.group): placed for placed in self.plan.placed}
        placed: dict[str, Placed] = {name: at[table.name, group] for name, (table, group) in names.items()}

        def make(held: tuple[Held, ...], num_features: int) -> BlockStorage:
            start: dict[str, Any] = {"seed": seed, "init_std": self.config.init_std}
            storage: BlockStorage
            if sharding.kernel == FBGEMM and takes(held[0]):
                storage = FbgemmStorage(held, self.device, num_features, **start)
            else:
                own = registry.AUTO if sharding.kernel == FBGEMM else sharding.kernel
                storage = BlockStorage(held, self.device, kernel=own, **start)
            self.storages.append(storage)
            return storage

        # Held aside from the module tree: state is saved by `shards`, and TorchRec's modules have none of their own.
        self._distributed = (
            distribute(
                collections,
                self.plan,
                placed,
                make,
                device=self.device,
                quantised=sharding.quantised_comms,
                local_world_size=machine.local_world_size,
            ),
        )
        for name, (table, group) in names.items():
            for feature in table.features:
                number = self._number[feature]
                is_shared = table.is_pooled and len(self.dims) > 1
                self._name_in[feature, group] = f"{number}@{name}" if is_shared else number

    def _deal(self, spec: FeatureSpec, sharding: ShardingConfig, seed: int) -> None:
        """Make this process's part of every dynamic and tiered table."""
        rank, world_size = dist.get_rank(), self.plan.world_size
        dealt = {}
        for name, table in spec.tables.items():
            if table.is_dynamic:
                own = DynamicTable(name, self.dims, self.config.dynamic_table(name), seed=seed)
                own.sharers = Everyone()
                self.manage(spec, own)
                dealt[name] = Dealt(own, partial(shard_of, world_size=world_size))
            elif name in self.config.tiers:
                blocks = RowBlocks(name, table.num_rows, world_size)
                self._num_rows[name] = table.num_rows
                tier = self.config.tiers[name].of_process(rank, world_size)
                start: dict[str, Any] = {"seed": seed, "init_std": self.config.init_std, "first_row": blocks.of(rank).start}
                self.manage(spec, TieredTable(name, len(blocks.of(rank)), self.dims, tier, device=self.device, **start))
                dealt[name] = Dealt(self.tiers[name], blocks.owner_of, blocks.of(rank).start)
        if dealt:
            self.dealt = DealtTables(dealt, self.dims, device=self.device, wire=WIRES[sharding.quantised_comms])

    def forward(self, batch: Batch, *, check: bool = True, pad: bool = False) -> dict[str, Tensor]:
        """As `EmbeddingCollection.forward`, for this process's rows; sequences are padded to the longest of this process's rows."""
        if batch.user_row_B is not None:
            raise DataError("sharded tables take training batches; a rank call is scored by one process")
        batch = self._checked(batch, check)
        ids = _ids_by_feature(batch)
        fields = self._look_up_bags(ids)
        rows = self._look_up_each(ids)
        inputs = {"dense": torch.cat([batch.request.dense_RF, batch.item.dense_RF], dim=1)}
        fields.update(self._look_up_dealt(batch, inputs, pad=pad))
        for group, dim in self.dims.items():
            for table in self._unpooled:
                for feature in table.features:
                    if feature not in self._max_length:
                        fields[feature, group] = self._pool(feature, ids[feature], rows[feature, group])
            columns = [self._scaled(feature, ids[feature], fields[feature, group]) for feature in self._fields]
            inputs[group] = torch.stack(columns, dim=1) if columns else torch.zeros(batch.num_rows, 0, dim, device=self.device)
        if self.config.sequence_length == "jagged" and not pad:
            for feature in self._max_length:
                inputs[f"offsets.{feature}"] = Jagged.of(ids[feature].lengths, batch.num_rows, 1).offsets[0]
                inputs.update({f"{group}.seq.{feature}": rows[feature, group] for group in self.dims})
            return inputs
        for feature, padding in self._paddings(ids, batch.num_rows).items():
            inputs[f"mask.{feature}"] = padding.masks[0]
            for group in self.dims:
                inputs[f"{group}.seq.{feature}"] = padding.pad(rows[feature, group])[0]
        return inputs

    def _rows_of(self, batch: Batch, ids: Mapping[str, Tensor], step: int | None) -> Mapping[str, Tensor]:
        assert self.dealt is not None
        return self.dealt.prepare(ids, {name: real_of(batch, self._parts[name]) for name in ids}, step=step)

    def _look_up_dealt(self, batch: Batch, inputs: dict[str, Tensor], *, pad: bool) -> dict[tuple[str, str], Tensor]:
        """Fields (B, D) by feature and group of the dealt tables; their sequences and where these are go to `inputs`."""
        fields: dict[tuple[str, str], Tensor] = {}
        if self.dealt is None:
            return fields
        selected = {name: self._parts[name].select(batch) for name in self.managed}
        ids = (getattr(block, kind).values for own in selected.values() for block in (own.request, own.item) for kind in KINDS)
        self.dealt.fetch(next((int(values[0]) for values in ids if values.numel()), None))
        length = self.config.padding if pad else self.config.sequence_length
        for name, own in selected.items():
            part = self._parts[name]
            index = BatchIndex(part.request, part.item, own, length=length)
            for group in self.dims:
                values, sequences = index.assemble(DealtRows(self.dealt, name, group))
                if values is not None:
                    fields.update({(key, group): column for key, column in zip(part.keys, values.unbind(1), strict=True)})
                inputs.update({f"{group}.seq.{key}": rows for key, rows in sequences.items()})
            inputs.update(index.places())
        return fields

    @property
    def looks_ahead(self) -> bool:
        """The ids of the next batch are with other processes yet."""
        return False

    def finish_step(self, step: int) -> None:
        """End training step number `step`, on all processes."""
        if self.dealt is not None:
            self.dealt.retire()
        super().finish_step(step)

    def table_metrics(self) -> dict[str, float]:
        """Figures of the managed tables of all processes together, the same everywhere."""
        if not self.managed:
            return {}
        everyone: list[Any] = [None] * self.plan.world_size
        dist.all_gather_object(everyone, {name: table.statistics() for name, table in self.managed.items()})
        found: dict[str, float] = {}
        for name in self.managed:
            parts: list[TableStatistics] = [own[name] for own in everyone]
            found.update(type(parts[0]).together(parts).as_metrics(f"table.{name}"))
        return found

    def shards(self, *, reading: bool = False) -> dict[str, Shard]:
        """This process's block of each table's values under `groups.<group>.<table>`, without elements where it has none.

        Of a table that all processes copy, the first one names the block; all do when `reading`.
        """
        found = {}
        for placed in self.plan.placed:
            found[f"groups.{placed.group}.{placed.table}"] = absent((placed.num_rows, placed.dim), torch.float32)
        for storage in self.storages:
            for place, held in enumerate(storage.held):
                if reading or not held.is_copy or dist.get_rank() == 0:
                    found[f"groups.{held.key}"] = storage.shard(place, storage.weight)
        return found

    def static_state(self, *, reading: bool = False) -> dict[str, Tensor | Shard]:
        """`shards`, and the blocks of tiered tables."""
        state: dict[str, Tensor | Shard] = {**self.shards(reading=reading)}
        for name, columns in self.tier_shards(reading=reading).items():
            state.update({f"groups.{group}.{name}": columns[f"value.{group}"] for group in self.dims})
        return state

    def tier_shards(self, *, reading: bool = False) -> dict[str, dict[str, Shard]]:
        """This process's block of each column of every tiered table, to be filled in place when `reading`."""
        return {name: shards_of(table, self._num_rows[name], reading=reading) for name, table in self.tiers.items()}

    @property
    def num_values(self) -> int:
        """Values of all tables of all processes, copies counted once. A collective call where there are dynamic tables."""
        static = sum(placed.num_rows * placed.dim for placed in self.plan.placed)
        if not self.managed:
            return static
        own = sum(table.num_rows(group) * dim for table in self.managed.values() for group, dim in table.dims.items())
        if dist.get_rank():  # the default row of a dynamic table, which each process has, is one
            own -= len(self.by_id) * sum(self.dims.values())
        return static + int(global_sum(torch.tensor(own)))

    def _look_up_bags(self, ids: Mapping[str, _Ids]) -> dict[tuple[str, str], Tensor]:
        """Sums (B, D) by feature and group, of the tables that are only pooled."""
        features = [feature for table in self._pooled for feature in table.features]
        if not features:
            return {}
        found = self._collections.bags(self._jagged(features, ids)).to_dict()
        return {(feature, group): found[self._name_in[feature, group]] for feature in features for group in self.dims}

    def _look_up_each(self, ids: Mapping[str, _Ids]) -> dict[tuple[str, str], Tensor]:
        """Rows (N, D) of each id by feature and group, of the tables that a sequence looks into."""
        features = [feature for table in self._unpooled for feature in table.features]
        rows: dict[tuple[str, str], Tensor] = {}
        if features:
            keyed = self._jagged(features, ids)
            for i, group in enumerate(self.dims):
                found = self._collections.each[f"g{i}"](keyed)
                rows.update({(feature, group): found[self._name_in[feature, group]].values() for feature in features})
        return rows

    @property
    def _collections(self) -> Any:
        return self._distributed[0].module

    def _jagged(self, features: list[str], ids: Mapping[str, _Ids]) -> Any:
        from ninerank.embedding.sharding.torchrec import jagged

        values, lengths = torch.cat([ids[name].values for name in features]), torch.cat([ids[name].lengths for name in features])
        return jagged([self._number[name] for name in features], values, lengths)

    def _pool(self, feature: str, ids: _Ids, rows_ND: Tensor) -> Tensor:
        if feature in self._single:
            return rows_ND
        offsets = torch.cat([ids.lengths.new_zeros(1), ids.lengths.cumsum(0)])
        return pool_rows(rows_ND, offsets, 1).squeeze(1)

    def _scaled(self, feature: str, ids: _Ids, sum_BD: Tensor) -> Tensor:
        return sum_BD / ids.lengths.clamp(min=1)[:, None] if feature in self._mean else sum_BD

    def _paddings(self, ids: Mapping[str, _Ids], num_rows: int) -> dict[str, Padding]:
        found = {}
        for feature, max_length in self._max_length.items():
            own = ids[feature]
            width = max_length if self.config.sequence_length == "max" else max(1, int(own.lengths.max()) if num_rows else 1)
            found[feature] = Padding.of(own.lengths, own.values.numel(), num_rows, [width])
        return found


def _agreed_plan(
    tables: tuple[ShardTable, ...],
    groups: Mapping[str, int],
    config: ShardingConfig,
    machine: Machine,
    *,
    apart: tuple[Apart, ...],
    batch_size: int,
    row_bytes: Mapping[str, int],
) -> Plan:
    """The plan of the first process, for all: their memory figures may differ. What it refuses, all refuse."""
    from ninerank.embedding.sharding.planner import make_plan

    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make_plan(tables, groups, config, machine, apart=apart, batch_size=batch_size, row_bytes=row_bytes).to_json()
        except NinerankError as problem:
            found[1] = problem
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    return Plan.from_json(found[0])


def _ids_by_feature(batch: Batch) -> dict[str, _Ids]:
    found: dict[str, _Ids] = {}
    for block in (batch.request, batch.item):
        for ids in (block.single, block.bags, block.sequences):
            found.update(_split(ids))
    return found


def _split(ids: KeyedJagged) -> dict[str, _Ids]:
    rows = ids.num_rows
    if ids.lengths is None:
        one_B = torch.ones(rows, dtype=torch.int64, device=ids.values.device)
        return {key: _Ids(values, one_B) for key, values in zip(ids.keys, ids.values.view(len(ids.keys), rows), strict=True)}
    length_FB = ids.lengths.view(len(ids.keys), rows)
    parts = torch.split_with_sizes(ids.values, length_FB.sum(1).tolist())
    return {key: _Ids(part, own_B) for key, part, own_B in zip(ids.keys, parts, length_FB, strict=True)}
