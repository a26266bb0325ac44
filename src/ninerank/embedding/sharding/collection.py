"""The embedding collection over several processes: the same inputs to a tower, from tables that lie apart.

Shape legend: B rows of this process, Fd dense features, Fs pooled fields, L sequence length, D embedding dim of a group, N ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig, pooled_keys
from ninerank.embedding.pooling import Jagged, Padding, pool_rows
from ninerank.embedding.shard import Shard, absent
from ninerank.embedding.sharding.config import ShardingConfig
from ninerank.embedding.sharding.plan import Machine, Placed, Plan
from ninerank.embedding.sharding.storage import BlockStorage, Held
from ninerank.embedding.sharding.tables import ShardTable, check_sharding, shard_tables
from ninerank.errors import DataError, NinerankError, SpecError
from ninerank.features.batch import Batch, KeyedJagged
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature

__all__ = ["ShardedEmbeddingCollection"]


@dataclass(frozen=True)
class _Ids:
    """Ids of one feature of a batch: lengths (B,) of its bags or sequences."""

    values: Tensor
    lengths: Tensor


class ShardedEmbeddingCollection(EmbeddingCollection):
    """Twin of `EmbeddingCollection` whose static tables lie over the processes of the default group.

    Every process calls `forward` with its rows of the global batch, as many as the others. Start values, outputs and gradients
    are those of one process. Raises SpecError for what cannot be sharded and DeviceError where the tables do not fit.
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
        from ninerank.embedding.sharding.planner import collections_of
        from ninerank.embedding.sharding.torchrec import distribute

        if config.mode != "sparse":
            raise SpecError("sharding needs embedding mode 'sparse'; in mode 'dense' every process keeps all tables")
        if sharding.quantised_comms == "bf16" and machine.kind == "cpu":
            raise SpecError("sharding.quantised_comms: gloo does not add bf16; on cpu take fp16 or none")
        check_sharding(spec, groups, sharding, machine.world_size)
        super().__init__(spec, {}, config, seed=seed)
        self.dims = dict(groups)
        self.device = device
        self.storages: list[BlockStorage] = []
        self._tables = shard_tables(spec, sharding)
        self.plan = _agreed_plan(self._tables, groups, sharding, machine, batch_size=batch_size, row_bytes=row_bytes)
        collections, names = collections_of(self._tables, groups)
        at = {(placed.table, placed.group): placed for placed in self.plan.placed}
        placed: dict[str, Placed] = {name: at[table.name, group] for name, (table, group) in names.items()}

        def make(held: tuple[Held, ...]) -> BlockStorage:
            storage = BlockStorage(held, device, kernel=sharding.kernel, seed=seed, init_std=config.init_std)
            self.storages.append(storage)
            return storage

        # Held aside from the module tree: state is saved by `shards`, and TorchRec's modules have none of their own.
        self._distributed = (
            distribute(
                collections,
                self.plan,
                placed,
                make,
                device=device,
                quantised=sharding.quantised_comms,
                local_world_size=machine.local_world_size,
            ),
        )
        self._pooled = [table for table in self._tables if table.is_pooled]
        self._unpooled = [table for table in self._tables if not table.is_pooled]
        self._number = {name: f"f{i}" for i, name in enumerate(name for table in self._tables for name in table.features)}
        self._fields = pooled_keys(spec)
        self._mean = {f.name for f in spec.features if isinstance(f, IdFeature) and f.multi and f.pooling == "mean"}
        self._max_length = {f.name: f.max_length for f in spec.features if isinstance(f, SequenceFeature)}
        self._single = {*spec.single_keys("request"), *spec.single_keys("item")}
        self._name_in: dict[tuple[str, str], str] = {}
        for name, (table, group) in names.items():
            for feature in table.features:
                number = self._number[feature]
                is_shared = table.is_pooled and len(groups) > 1
                self._name_in[feature, group] = f"{number}@{name}" if is_shared else number

    def forward(self, batch: Batch, *, check: bool = True, pad: bool = False) -> dict[str, Tensor]:
        """As `EmbeddingCollection.forward`, for this process's rows; sequences are padded to the longest of this process's rows."""
        if batch.user_row_B is not None:
            raise DataError("sharded tables take training batches; a rank call is scored by one process")
        if check and batch.item.dense_RF.device.type == "cpu":
            self.check(batch)
        ids = _ids_by_feature(batch)
        fields = self._look_up_bags(ids)
        rows = self._look_up_each(ids)
        inputs = {"dense": torch.cat([batch.request.dense_RF, batch.item.dense_RF], dim=1)}
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
        """`shards`."""
        return {**self.shards(reading=reading)}

    @property
    def num_values(self) -> int:
        """Values of all tables of all processes, copies counted once."""
        return sum(placed.num_rows * placed.dim for placed in self.plan.placed)

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
    batch_size: int,
    row_bytes: Mapping[str, int],
) -> Plan:
    """The plan of the first process, for all: their memory figures may differ. What it refuses, all refuse."""
    from ninerank.embedding.sharding.planner import make_plan

    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make_plan(tables, groups, config, machine, batch_size=batch_size, row_bytes=row_bytes).to_json()
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
