"""Tables that are looked up together: the merged static ones, or one managed table.

Shape legend: R rows of a block, N ids, F features, D embedding dim.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from ninerank.embedding.managed import ManagedTable
from ninerank.embedding.pooling import pool_rows
from ninerank.embedding.rows import SideRows
from ninerank.embedding.table import TableLayout
from ninerank.features.batch import Batch, Block
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature, Side

__all__ = ["SIDES", "ManagedRows", "Part", "ids_of", "pooled_keys", "prepared"]

SIDES: tuple[Side, ...] = ("request", "item")
KINDS = ("single", "bags", "sequences")


def pooled_keys(spec: FeatureSpec) -> tuple[str, ...]:
    """Names of the pooled fields, in the order of the collection's output: per side single ids, then bags; request side first."""
    return tuple(key for side in SIDES for key in (*spec.single_keys(side), *spec.bag_keys(side)))


class Part:
    """Which features look into the tables of one layout, and where their rows lie.

    keys: names of its pooled fields, in the order of `pooled_keys`; request_keys, item_keys: those of one side.
    """

    def __init__(self, spec: FeatureSpec, layout: TableLayout) -> None:
        table_of = {feature: name for name in layout.names for feature in spec.tables[name].features}
        self.layout = layout
        self.keys = tuple(key for key in pooled_keys(spec) if key in table_of)
        self.request_keys = tuple(key for key in self.keys if spec.side(key) == "request")
        self.item_keys = self.keys[len(self.request_keys) :]
        self.request, self.item = (_side(spec, side, layout, table_of) for side in SIDES)
        self.is_whole = set(layout.names) == set(spec.tables)

    def select(self, batch: Batch) -> Batch:
        """The batch with this part's features alone."""
        if self.is_whole:
            return batch
        request, item = (
            replace(
                block,
                single=block.single.select(side.single.keys),
                bags=block.bags.select(side.bags.keys),
                sequences=block.sequences.select(side.sequences.keys),
            )
            for side, block in ((self.request, batch.request), (self.item, batch.item))
        )
        return replace(batch, request=request, item=item)


def _side(spec: FeatureSpec, side: Side, layout: TableLayout, table_of: dict[str, str]) -> SideRows:
    def tables(keys: tuple[str, ...]) -> dict[str, str]:
        return {key: table_of[key] for key in keys if key in table_of}

    own = [feature for feature in spec.features if feature.side == side]
    return SideRows(
        layout,
        tables(spec.single_keys(side)),
        tables(spec.bag_keys(side)),
        tables(spec.sequence_keys(side)),
        mean_bags=[f.name for f in own if isinstance(f, IdFeature) and f.multi and f.pooling == "mean"],
        max_lengths={f.name: f.max_length for f in own if isinstance(f, SequenceFeature)},
    )


class ManagedRows:
    """One group of a managed table, looked up as a `TableGroup` is; rows and values travel between the model's device and the table's."""

    def __init__(self, table: ManagedTable, group: str) -> None:
        self._table, self._group = table, group

    def rows(self, row_N: Tensor) -> Tensor:
        """Values (N, D)."""
        return self._table.rows(self._group, row_N).to(row_N.device)

    def pool(self, row_N: Tensor, offsets: Tensor | None, num_features: int, mean_F: Tensor | None = None) -> Tensor:
        """Bags (B, F, D)."""
        return pool_rows(self.rows(row_N), offsets, num_features, mean_F)


def ids_of(batch: Batch, part: Part) -> Tensor:
    """All ids (N,) of a part's features."""
    found = []
    for side in SIDES:
        for kind in KINDS:
            ids, keys = getattr(getattr(batch, side), kind), getattr(getattr(part, side), kind).keys
            spans = ids.spans() if keys else {}
            found += [ids.values[spans[key]] for key in keys]
    return torch.cat(found)


def prepared(batch: Batch, tables: Collection[tuple[ManagedTable, Part]], *, step: int | None) -> Batch:
    """The batch with rows in place of the ids of managed tables, each told all of its ids in one call."""
    parts = {(side, kind): getattr(getattr(batch, side), kind) for side in SIDES for kind in KINDS}
    spans = {place: ids.spans() for place, ids in parts.items()}
    values = {place: ids.values.clone() for place, ids in parts.items()}
    for table, part in tables:
        own = [(place, spans[place][key]) for place in parts for key in getattr(getattr(part, place[0]), place[1]).keys]
        ids_N = torch.cat([parts[place].values[span] for place, span in own])
        row_N = table.prepare(ids_N, step=step)
        for (place, span), rows in zip(own, torch.split_with_sizes(row_N, [span.stop - span.start for _, span in own]), strict=True):
            values[place][span] = rows

    def block(side: Side) -> Block:
        single, bags, sequences = (replace(parts[side, kind], values=values[side, kind]) for kind in KINDS)
        own: Block = getattr(batch, side)
        return replace(own, single=single, bags=bags, sequences=sequences)

    return replace(batch, request=block("request"), item=block("item"), is_prepared=True)
