"""Random batches of a spec: every id of every table can occur, bags and histories of any length, empty ones among them.

Such a batch asks of kernels and devices what no log may hold: rows that nobody ever saw, histories at their bound.
"""

import torch

from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import FeatureSpec, NumericFeature, Side

__all__ = ["draw_batch"]

LONGEST_BAG = 4  # of a bag without a bound of its own


def draw_batch(
    spec: FeatureSpec, num_rows: int, draw: torch.Generator, *, num_requests: int | None = None, longest: int | None = None
) -> Batch:
    """`num_rows` training rows with labels, or with `num_requests` their candidates in a rank call.

    longest: bound on ids of a bag or history besides the spec's own. Numbers are drawn from the standard normal distribution.
    """
    user_row_B = None if num_requests is None else torch.randint(0, num_requests, (num_rows,), generator=draw)
    request = _block(spec, "request", num_rows if num_requests is None else num_requests, draw, longest)
    item = _block(spec, "item", num_rows, draw, longest)
    if num_requests is not None:
        return Batch(request, item, user_row_B)
    label_BT = torch.randint(0, 2, (num_rows, len(spec.labels)), generator=draw).float()
    return Batch(request, item, None, label_BT, torch.rand(num_rows, generator=draw))


def _block(spec: FeatureSpec, side: Side, num_rows: int, draw: torch.Generator, longest: int | None) -> Block:
    return Block(
        _ids(spec, spec.single_keys(side), num_rows, draw, is_single=True),
        _ids(spec, spec.bag_keys(side), num_rows, draw, longest=longest),
        _ids(spec, spec.sequence_keys(side), num_rows, draw, longest=longest),
        torch.randn(num_rows, len(spec.dense_keys(side)), generator=draw),
    )


def _ids(
    spec: FeatureSpec, keys: tuple[str, ...], num_rows: int, draw: torch.Generator, *, is_single: bool = False, longest: int | None = None
) -> KeyedJagged:
    values, lengths = [], []
    for key in keys:
        length_R = torch.ones(num_rows, dtype=torch.int64)
        if not is_single:
            length_R = torch.randint(0, _most(spec, key, longest) + 1, (num_rows,), generator=draw)
        lengths.append(length_R)
        rows = spec.tables[str(spec.table_of(key))].num_rows
        values.append(torch.randint(0, rows, (int(length_R.sum()),), generator=draw))
    nothing = torch.zeros(0, dtype=torch.int64)
    return KeyedJagged(keys, torch.cat([nothing, *values]), None if is_single else torch.cat([nothing, *lengths]), num_rows)


def _most(spec: FeatureSpec, key: str, longest: int | None) -> int:
    """Ids that a row of a bag or history may have."""
    feature = spec.feature(key)
    assert not isinstance(feature, NumericFeature)
    own = feature.max_length or LONGEST_BAG
    return own if longest is None else min(own, longest)
