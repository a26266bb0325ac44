"""Requests as traffic has them: few users and items are asked for often (Zipf), made of a bundle's own rows or of a request file.

Shape legend: N candidates of a request.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ninerank.config import Config
from ninerank.errors import DataError, RequestError, nearest
from ninerank.predictor.client import build_request
from ninerank.predictor.request import RequestSchema
from ninerank.predictor.requestfile import RequestFile

__all__ = ["Workload", "requests_of_bundle", "requests_of_file", "skewed"]


class Workload(Config):
    """num_requests: different ones, drawn from again and again. candidates: of each. skew: exponent s of the Zipf law by which
    rows are chosen (0: all alike). send: candidates as `ids` to be looked up, or with `features` inline. seed: of the choice.
    """

    num_requests: int = Field(default=1_000, ge=1, le=1_000_000)
    candidates: int = Field(default=256, ge=1, le=1_000_000)
    skew: float = Field(default=1.05, ge=0, le=10)
    send: Literal["features", "ids"] = "features"
    seed: int = Field(default=0, ge=0)


def skewed(num_values: int, size: int, skew: float, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """`size` numbers below `num_values`; the k-th most frequent has a share of k^-skew, and which that is is drawn too.

    >>> counts = np.bincount(skewed(1000, 10_000, 1.05, np.random.default_rng(0)), minlength=1000)
    >>> bool(np.sort(counts)[-10:].sum() > 3000)
    True
    """
    share = 1.0 / np.arange(1, num_values + 1) ** skew
    edges = np.cumsum(share)
    rank = np.searchsorted(edges, random.random(size) * edges[-1])
    drawn: npt.NDArray[np.int64] = random.permutation(num_values)[np.minimum(rank, num_values - 1)]
    return drawn


def requests_of_bundle(
    bundle_dir: str | Path, workload: Workload, *, items: str | Path | None = None, item_key: str | None = None
) -> list[bytes]:
    """Serialised requests of a bundle's golden rows; candidates of the `items` file (Parquet, one row an item) where it is given.

    Raises DataError where `ids` are asked for and no column of ids is known, or a column is missing.
    """
    from ninerank.predictor.bundle import Bundle  # loads torch
    from ninerank.predictor.cache.entities import default_item_key

    bundle = Bundle.load(bundle_dir)
    schema, rows = RequestSchema.of(bundle.spec), bundle.golden.rows
    users = rows.select(schema.request.names)
    table = rows.select(schema.item.names) if items is None else _items(items, schema)
    key = item_key or default_item_key(bundle.spec)
    if workload.send == "ids":
        if key is None:
            raise DataError("ids are to be sent, and no item feature is known to be the id; name it (--item-key)")
        if items is None and key not in table.schema.names:
            raise DataError(f"item key {key!r} is no item feature; {nearest(key, table.schema.names)}")
    ids = _ids(items, key) if items is not None and key is not None and workload.send == "ids" else None
    random = np.random.default_rng(workload.seed)
    user_R = skewed(users.num_rows, workload.num_requests, workload.skew, random)
    made = []
    for user in user_R.tolist():
        chosen = pa.array(skewed(table.num_rows, workload.candidates, workload.skew, random))
        given = {name: value for name, value in users.slice(user, 1).to_pylist()[0].items() if value is not None}
        if workload.send == "ids":
            known = table.column(key) if ids is None else ids
            request = build_request(given, ids=known.take(chosen))
        else:
            columns = table.take(chosen)
            request = build_request(given, dict(zip(columns.schema.names, columns.columns, strict=True)))
        made.append(request.SerializeToString())
    return made


def requests_of_file(path: str | Path) -> list[bytes]:
    """One serialised request of a request file; raises RequestError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    asked = RequestFile.from_text(text, str(path))
    request = build_request(asked.user, asked.items, ids=asked.ids, top_k=asked.top_k)
    request.model_name, request.model_version = asked.model, asked.version
    return [request.SerializeToString()]


def _items(path: str | Path, schema: RequestSchema) -> pa.RecordBatch:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        table = file.read(columns=[name for name in schema.item.names if name in names]).combine_chunks()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not table.num_rows:
        raise DataError(f"{path}: holds no items")
    given: Sequence[str] = table.column_names
    batch = table.to_batches()[0]
    return schema.conform("item", {name: batch.column(name) for name in given}, table.num_rows)[0]


def _ids(path: str | Path, key: str) -> pa.Array:
    names = pq.read_schema(path).names
    if key not in names:
        raise DataError(f"{path}: key column {key!r} is missing; {nearest(key, names)}")
    return pq.read_table(path, columns=[key]).column(key).combine_chunks()
