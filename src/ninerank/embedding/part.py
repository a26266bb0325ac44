"""Tables that are looked up together: the merged static ones, or one managed table.

Shape legend: R rows of a block, N ids, F features, D embedding dim.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ninerank.embedding.managed import ManagedTable
from ninerank.embedding.pooling import pool_rows
from ninerank.embedding.rows import SideRows
from ninerank.embedding.table import TableLayout
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature, Side

__all__ = ["KINDS", "SIDES", "ManagedRows", "Part", "ids_of", "pooled_keys", "prepared", "real_of"]

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
    return torch.cat([ids.values[span] for ids, span in _spans(batch, part)])


def real_of(batch: Batch, part: Part) -> Tensor | None:
    """Which of `ids_of` (bool (N,)) are of rows that are no padding; None where all are."""
    if not batch.padding:
        return None
    return torch.cat([(_row_of(ids) < batch.num_real_rows)[span] for ids, span in _spans(batch, part)])


def _spans(batch: Batch, part: Part) -> Iterator[tuple[KeyedJagged, slice]]:
    for side in SIDES:
        for kind in KINDS:
            ids, keys = getattr(getattr(batch, side), kind), getattr(getattr(part, side), kind).keys
            spans = ids.spans() if keys else {}
            for key in keys:
                yield ids, spans[key]


def _row_of(ids: KeyedJagged) -> Tensor:
    """Row (N,) of the batch that each id belongs to."""
    row_M = torch.arange(ids.num_rows).repeat(len(ids.keys))
    return row_M if ids.lengths is None else row_M.repeat_interleave(ids.lengths, output_size=ids.values.numel())


def prepared(batch: Batch, parts: Mapping[str, Part], rows_of: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Batch:
    """The batch with rows in place of the ids of managed tables; `rows_of` is told all ids of all of them at once, by table."""
    values = {(side, kind): getattr(getattr(batch, side), kind).values.clone() for side in SIDES for kind in KINDS}
    places = {
        table: [
            ((side, kind), getattr(getattr(batch, side), kind).spans()[key])
            for side, kind in values
            for key in getattr(getattr(part, side), kind).keys
        ]
        for table, part in parts.items()
    }
    found = rows_of({table: torch.cat([values[place][span] for place, span in own]) for table, own in places.items()})
    for table, own in places.items():
        parted = torch.split_with_sizes(found[table], [span.stop - span.start for _, span in own])
        for (place, span), rows in zip(own, parted, strict=True):
            values[place][span] = rows

    def block(side: Side) -> Block:
        whole: Block = getattr(batch, side)
        single, bags, sequences = (replace(getattr(whole, kind), values=values[side, kind]) for kind in KINDS)
        return replace(whole, single=single, bags=bags, sequences=sequences)

    return replace(batch, request=block("request"), item=block("item"), is_prepared=True)
