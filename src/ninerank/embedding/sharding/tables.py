"""What of a spec matters to sharding: tables with their features, which are pooled and which are not, checks of what a recipe asks."""

from collections.abc import Mapping
from dataclasses import dataclass

from ninerank.embedding.sharding.config import ShardingConfig, ShardingKind
from ninerank.embedding.sharding.plan import Growing
from ninerank.errors import SpecError, nearest
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature

__all__ = ["ShardTable", "growing_tables", "check_sharding", "kind_at", "shard_tables"]

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


def shard_tables(spec: FeatureSpec, config: ShardingConfig) -> tuple[ShardTable, ...]:
    """Static tables of a fitted spec, in its order."""
    return tuple(
        ShardTable(
            name,
            table.num_rows,
            table.features,
            tuple(config.pooling.get(feature, _ids_a_row(spec, feature)) for feature in table.features),
            is_pooled=not any(isinstance(spec.feature(feature), SequenceFeature) for feature in table.features),
        )
        for name, table in spec.tables.items()
        if not table.is_dynamic
    )


def growing_tables(spec: FeatureSpec, groups: Mapping[str, int], row_bytes: Mapping[str, int]) -> tuple[Growing, ...]:
    """Dynamic tables of a spec at each group's dim."""
    dynamic = [name for name, table in spec.tables.items() if table.is_dynamic]
    return tuple(Growing(name, group, dim, row_bytes[group]) for group, dim in groups.items() for name in dynamic)


def check_sharding(spec: FeatureSpec, groups: Mapping[str, int], config: ShardingConfig, world_size: int) -> None:
    """Raise SpecError for a table or feature that the spec has not, a kind for a dynamic table, and columns that do not divide among
    the processes.
    """
    for name, kind in config.tables.items():
        if name not in spec.tables:
            raise SpecError(f"sharding.tables: unknown table {name!r}; {nearest(name, spec.tables)}")
        if spec.tables[name].is_dynamic and kind != "auto":
            raise SpecError(f"sharding.tables: {name} = {kind}, but it is a dynamic table: its rows always lie by id")
    looked_up = [feature for table in spec.tables.values() for feature in table.features]
    for name in config.pooling:
        if name not in looked_up:
            raise SpecError(f"sharding.pooling: {name!r} is no feature with a table; {nearest(name, looked_up)}")
    for name in (name for name, table in spec.tables.items() if not table.is_dynamic):
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
