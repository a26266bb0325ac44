"""What of a spec matters to sharding: tables with their features, which are pooled and which are not, checks of what a recipe asks."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ninerank.embedding.sharding.blocks import RowBlocks
from ninerank.embedding.sharding.config import ShardingConfig, ShardingKind
from ninerank.embedding.sharding.plan import Apart
from ninerank.errors import SpecError, nearest
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature

__all__ = ["ShardTable", "check_sharding", "kind_at", "shard_tables", "tables_apart"]

POOLING_UNKNOWN = 10.0


@dataclass(frozen=True)
class ShardTable:
    """A table and the features that look into it, with the ids that each is expected to have a row.

    is_pooled: no sequence looks into it, so that it is looked up as bags. Where one does, all its features are looked up id by id.
    """

    name: str
    num_rows: int
    features: tuple[str, ...]
    ids_a_row: tuple[float, ...]
    is_pooled: bool


def shard_tables(spec: FeatureSpec, config: ShardingConfig, tiers: Collection[str] = ()) -> tuple[ShardTable, ...]:
    """Static tables of a fitted spec that are not tiered, in its order."""
    return tuple(
        ShardTable(
            name,
            table.num_rows,
            table.features,
            tuple(config.pooling.get(feature, _ids_a_row(spec, feature)) for feature in table.features),
            is_pooled=not any(isinstance(spec.feature(feature), SequenceFeature) for feature in table.features),
        )
        for name, table in spec.tables.items()
        if not table.is_dynamic and name not in tiers
    )


def tables_apart(
    spec: FeatureSpec, groups: Mapping[str, int], row_bytes: Mapping[str, int], tiers: Collection[str] = ()
) -> tuple[Apart, ...]:
    """Dynamic and tiered tables of a spec at each group's dim."""
    return tuple(
        Apart(name, group, dim, row_bytes[group], "by_id" if table.is_dynamic else "tiered", table.num_rows)
        for group, dim in groups.items()
        for name, table in spec.tables.items()
        if table.is_dynamic or name in tiers
    )


def check_sharding(
    spec: FeatureSpec, groups: Mapping[str, int], config: ShardingConfig, world_size: int, tiers: Collection[str] = ()
) -> None:
    """Raise SpecError for a table or feature that the spec has not, a kind that a dynamic or tiered table cannot have, columns or rows of
    tiered tables that do not divide among the processes.
    """
    for name, kind in config.tables.items():
        if name not in spec.tables:
            raise SpecError(f"sharding.tables: unknown table {name!r}; {nearest(name, spec.tables)}")
        if spec.tables[name].is_dynamic and kind != "auto":
            raise SpecError(f"sharding.tables: {name} = {kind}, but it is a dynamic table: its rows always lie by id")
        if name in tiers and kind not in ("auto", "row_wise"):
            raise SpecError(f"sharding.tables: {name} = {kind}, but it is a tiered table: it is always cut into blocks of rows")
    looked_up = [feature for table in spec.tables.values() for feature in table.features]
    for name in config.pooling:
        if name not in looked_up:
            raise SpecError(f"sharding.pooling: {name!r} is no feature with a table; {nearest(name, looked_up)}")
    for name in tiers:
        blocks = RowBlocks(name, spec.tables[name].num_rows, world_size)
        if not blocks.of(world_size - 1):
            raise SpecError(f"embedding.tiers: table {name!r} has {blocks.num_rows} rows, too few for {world_size} processes")
    for name in (name for name, table in spec.tables.items() if not table.is_dynamic and name not in tiers):
        for group, dim in groups.items():
            kind = config.kind_of(name)
            if kind == "column_wise" and dim > 1 and dim % world_size:
                raise SpecError(
                    f"sharding: table {name!r} column-wise: {dim} columns (group {group!r}) do not divide among {world_size} processes"
                )


def kind_at(config: ShardingConfig, table: str, dim: int) -> ShardingKind:
    """Kind of a table at one group's dim: a single column is not split."""
    kind = config.kind_of(table)
    return "table_wise" if kind == "column_wise" and dim == 1 else kind


def _ids_a_row(spec: FeatureSpec, name: str) -> float:
    feature = spec.feature(name)
    if isinstance(feature, SequenceFeature):
        return float(feature.max_length)
    if isinstance(feature, IdFeature) and feature.multi:
        return float(feature.max_length or POOLING_UNKNOWN)
    return 1.0
