"""Dynamic tables as they are served: raw ids become rows on the host, and from there on their tables are tables like any other.

A bundle holds the rows of all tables of a group in one storage; a dynamic table of I ids owns I + 1 rows of it, row 0 (zeros) first.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ninerank.embedding.dynamic.frozen import FrozenIds
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.encoding import Hashed, Vocabulary
from ninerank.features.spec import FeatureSpec, IdFeature

__all__ = ["RawIds", "lookup_spec"]


def lookup_spec(spec: FeatureSpec, num_ids: Mapping[str, int]) -> FeatureSpec:
    """The spec of a lookup that finds rows in place of raw ids: dynamic table t is one of `num_ids[t]` + 1 rows.

    >>> from ninerank.features.encoding import Dynamic
    >>> spec = FeatureSpec(labels=("y",), features=(IdFeature(name="a", role="user", encoding=Dynamic()),))
    >>> lookup_spec(spec, {"a": 7}).tables["a"]
    TableSpec(name='a', num_rows=8, features=('a',), is_dynamic=False)
    """

    def fixed(feature: IdFeature) -> IdFeature:
        count = num_ids[feature.table_name]
        return feature.model_copy(update={"encoding": Hashed(num_buckets=count) if count else Vocabulary(values=()), "default": None})

    features = (fixed(f) if isinstance(f, IdFeature) and f.is_dynamic else f for f in spec.features)
    return spec.model_copy(update={"features": tuple(features)})


class RawIds:
    """The ids of a bundle's dynamic tables by name; turns a batch's raw ids into rows. Any number of threads may use it."""

    def __init__(self, spec: FeatureSpec, tables: Mapping[str, FrozenIds]) -> None:
        self._of_feature = {feature: tables[name] for name, table in spec.tables.items() if table.is_dynamic for feature in table.features}

    def rows(self, batch: Batch) -> Batch:
        """The batch, which lies on the host, with rows in place of raw ids."""
        return replace(batch, request=self.block(batch.request), item=self.block(batch.item))

    def block(self, block: Block) -> Block:
        """One side with rows in place of raw ids."""
        return replace(
            block, single=self._translated(block.single), bags=self._translated(block.bags), sequences=self._translated(block.sequences)
        )

    def _translated(self, ids: KeyedJagged) -> KeyedJagged:
        if self._of_feature.keys().isdisjoint(ids.keys):
            return ids
        row_N = ids.values.clone()
        values = row_N.numpy()
        if ids.lengths is None:
            ends = np.arange(1, len(ids.keys) + 1) * ids.num_rows
        else:
            ends = ids.lengths.numpy().reshape(len(ids.keys), ids.num_rows).sum(1).cumsum()
        first = 0
        for key, end in zip(ids.keys, ends.tolist(), strict=True):
            known = self._of_feature.get(key)
            if known is not None:
                known.find(values[first:end], values[first:end])
            first = end
        return replace(ids, values=row_N)
