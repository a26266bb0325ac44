"""The engine: a bundle in memory that turns requests into scores.

    RankInput -> transform (the user's row once) -> raw ids to rows -> lookup (the user's rows once) -> compiled dense graph
    -> sigmoid -> scores

Where it keeps values by item (`itemvalues`), candidates with keys that it knows skip all of that but the rest of the graph.

Shape legend: B rows, N candidates, T tasks.
"""

import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from ninerank.device import Device
from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.dynamic.frozen import FrozenIds
from ninerank.embedding.quantize import QuantizedTable, check_dtype
from ninerank.embedding.request import RequestLookup
from ninerank.errors import BundleError, DataError, RequestError, SpecError
from ninerank.features.batch import Batch, Block
from ninerank.features.transform import Transform
from ninerank.fusion.backends import AUTO, Precision, lower
from ninerank.fusion.compile import graph_for_one
from ninerank.predictor.bundle import ROUNDING_TOLERANCE, Bundle
from ninerank.predictor.graph import build_graph
from ninerank.predictor.itemvalues import ItemScorer, ItemStore, NoItemValuesError
from ninerank.predictor.rawids import RawIds, lookup_spec
from ninerank.predictor.request import RankInput, RankOutput, RequestSchema, StageTimes

__all__ = ["BF16_TOLERANCE", "Engine", "lookup_of", "raw_ids_of"]

log = logging.getLogger(__name__)

BF16_TOLERANCE = 2e-3


class Engine:
    """Scores requests with one bundle on one device; every method may be called from any number of threads at once.

    A score does not depend on the other candidates of the request beyond rounding (float32: below 1e-6).
    """

    def __init__(
        self, bundle: Bundle, device: Device, *, backend: str = AUTO, precision: Precision = "fp32", item_values_mb: float = 0.0
    ) -> None:
        self.spec = bundle.spec
        self.schema = RequestSchema.of(bundle.spec)
        self.device = device
        self._transform = Transform(bundle.spec)
        graph = build_graph(bundle.graph, device.torch_device)
        one = graph_for_one(graph, bundle.manifest.passes)
        self._graph = lower(graph, device.torch_device, one=one, backend=backend, precision=precision)
        self._inputs = tuple(given.name for given in self._graph.inputs)
        num_bytes, records = int(item_values_mb * 1e6), bundle.manifest.passes

        def item_scorer(embedding: EmbeddingCollection) -> ItemScorer:
            return ItemScorer.of(graph, records, embedding, num_bytes, backend=backend, precision=precision)

        self._make_item_scorer = item_scorer if item_values_mb > 0 else None
        self._bind(bundle)

    def _bind(self, bundle: Bundle) -> None:
        """Take rows and ids from the bundle."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._raw_ids = raw_ids_of(bundle)
        self._embedding = lookup_of(bundle, self.device)
        is_on_host = self.device.torch_device.type == "cpu" and RequestLookup.takes(self._embedding)
        self._lookup = RequestLookup(self._embedding, self._graph.dtypes) if is_on_host else None
        self._item_scorer: ItemScorer | None = None
        if self._make_item_scorer is not None:
            try:
                if self._lookup is None:
                    raise NoItemValuesError(f"values by item are kept on the CPU, the model runs on {self.device.name}")
                self._item_scorer = self._make_item_scorer(self._embedding)
            except NoItemValuesError as error:
                log.warning("%s %s keeps no values by item: %s", self.manifest.model_name, self.manifest.model_version, error)

    def renewed(self, bundle: Bundle) -> "Engine":
        """An engine over other rows and ids of the same model; it shares this one's graph. Raises BundleError for rows that do not fit."""
        engine = copy.copy(self)
        engine._bind(bundle)
        return engine

    @classmethod
    def load(
        cls,
        bundle_dir: str | Path,
        device: str = "auto",
        *,
        backend: str = AUTO,
        precision: Precision = "fp32",
        item_values_mb: float = 0.0,
    ) -> "Engine":
        """Engine for the bundle in `bundle_dir` on `device` (`auto`, `cpu`, `cuda[:i]`, `npu[:i]`), warm and checked.

        backend, precision: as `fusion.backends.lower` takes them; bf16 must keep the golden scores within 2e-3 of what fp32 must.
        item_values_mb: memory for what the model computes of an item alone, by the keys that `rank` is given; 0 for none.

        Raises BundleError for a bundle that does not verify or does not give its golden scores here, DeviceError for a device
        that cannot run.
        """
        bundle = Bundle.load(bundle_dir)
        engine = cls(bundle, Device.resolve(device), backend=backend, precision=precision, item_values_mb=item_values_mb)
        engine.check_golden(bundle)
        return engine

    @property
    def item_store(self) -> ItemStore | None:
        """Values kept by item; None where none are."""
        return None if self._item_scorer is None else self._item_scorer.store

    def rank(self, rank_input: RankInput, top_k: int = 0, *, item_keys: npt.NDArray[np.int64] | None = None) -> RankOutput:
        """Score and order the candidates; `top_k` (0: all) bounds the order alone. Raises RequestError for bad values.

        item_keys: int64 (N,), one a candidate. Equal keys stand for equal item features for as long as the engine lives: whoever changes
        an item gives it another key. A negative key stands for nothing, such as an item with features of the request's own. Where the
        engine keeps values by item, candidates with known keys are neither encoded nor looked up; elsewhere keys are not read.
        """
        start = time.perf_counter_ns()
        if item_keys is not None and len(item_keys) != rank_input.items.num_rows:
            raise RequestError(f"{len(item_keys)} item keys for {rank_input.items.num_rows} candidates; one a candidate is needed")
        try:
            if item_keys is not None and self._item_scorer is not None and len(item_keys):
                scores_NT, times = self._kept_scores(self._item_scorer, rank_input, np.ascontiguousarray(item_keys, np.int64), start)
            else:
                scores_NT, times = self._scores(self._transform.request(rank_input.user, rank_input.items), start)
        except DataError as error:
            raise RequestError(str(error)) from None
        order = np.argsort(-scores_NT[:, 0], kind="stable")
        return RankOutput(scores_NT, order[:top_k] if top_k else order, times)

    def rank_many(self, inputs: Sequence[RankInput]) -> list[RankOutput]:
        """What `rank` gives for each of several requests, computed at once: devices like one large batch better than many small ones.

        Raises RequestError for bad values in any of them. Times are those of the whole.
        """
        start = time.perf_counter_ns()
        counts = [rank_input.items.num_rows for rank_input in inputs]
        users = pa.concat_batches([rank_input.user for rank_input in inputs])
        items = pa.concat_batches([rank_input.items for rank_input in inputs])
        try:
            batch = self._transform.request(users, items, np.repeat(np.arange(len(inputs)), counts))
        except DataError as error:
            raise RequestError(str(error)) from None
        scores_NT, times = self._scores(batch, start)
        parts = np.split(scores_NT, np.cumsum(counts)[:-1])
        return [RankOutput(part_NT, np.argsort(-part_NT[:, 0], kind="stable"), times) for part_NT in parts]

    def score(self, rows: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """scores_BT of rows that hold user and item columns side by side, as a training log does. Raises DataError."""
        return self._scores(self._transform.batch(rows, labels=False), time.perf_counter_ns())[0]

    def check_golden(self, bundle: Bundle, tolerance: float | None = None) -> float:
        """Largest difference from the golden scores, which are the trained model's; this also warms the engine.

        tolerance: what is allowed, by default what the manifest says. Raises BundleError unless the golden rows get their scores within
        it, and a request those of the same rows.
        """
        golden = bundle.golden
        try:
            rounding = BF16_TOLERANCE if self._graph.precision == "bf16" else 0.0
            allowed = (self.manifest.golden_tolerance if tolerance is None else tolerance) + rounding
            difference = self._compare(self.score(golden.rows), golden.scores_BT, allowed, "golden scores")
            # The first user with every candidate, against the same as joined rows: the way of a rank call.
            request = RankInput(golden.rows.select(self.schema.request.names).slice(0, 1), golden.rows.select(self.schema.item.names))
            again_NT = self.score(self.schema.joined(request))
            self._compare(self.rank(request).scores_NT, again_NT, ROUNDING_TOLERANCE + rounding, "scores of a request and of the same rows")
            if self._item_scorer is not None:
                keys = np.arange(len(again_NT))
                for what in ("first", "again"):
                    kept_NT = self.rank(request, item_keys=keys).scores_NT
                    self._compare(
                        kept_NT, again_NT, ROUNDING_TOLERANCE + rounding, f"scores from values by item, {what}, and of the same rows"
                    )
                self._item_scorer.store.clear()
        except BundleError:
            raise
        except Exception as error:  # a graph that is wrong may fail in any way
            raise BundleError(f"bundle {bundle.directory}: its golden rows cannot be scored ({type(error).__name__}: {error})") from error
        return difference

    def _compare(self, scores_BT: npt.NDArray[np.float32], wanted_BT: npt.NDArray[np.float32], tolerance: float, what: str) -> float:
        if scores_BT.shape != wanted_BT.shape:
            raise BundleError(f"{what} differ in shape: {scores_BT.shape} here, {wanted_BT.shape} wanted")
        difference = float(np.abs(scores_BT - wanted_BT).max())
        if not difference <= tolerance:
            raise BundleError(
                f"{what} of {self.manifest.model_name} {self.manifest.model_version} differ by {difference:.3g} on {self.device.name}, "
                f"at most {tolerance:g} is allowed; the bundle is not served"
            )
        log.info("%s: largest difference %.3g of %g allowed", what, difference, tolerance)
        return difference

    def _scores(self, batch: Batch, start_ns: int) -> tuple[npt.NDArray[np.float32], StageTimes]:
        transformed = time.perf_counter_ns()
        with torch.inference_mode():
            inputs = self._sides(self._raw_ids.rows(batch))
            looked_up = time.perf_counter_ns()
            logits_BT = self._graph(*[inputs[key] for key in self._inputs])
            scores_BT = torch.sigmoid(logits_BT.to(torch.float32)).cpu().numpy()
        done = time.perf_counter_ns()
        times = StageTimes((transformed - start_ns) // 1000, (looked_up - transformed) // 1000, (done - looked_up) // 1000)
        return scores_BT, times

    def _kept_scores(
        self, scorer: ItemScorer, rank_input: RankInput, key_N: npt.NDArray[np.int64], start_ns: int
    ) -> tuple[npt.NDArray[np.float32], StageTimes]:
        request = self._raw_ids.block(self._transform.side("request", rank_input.user, 1))
        transformed = time.perf_counter_ns()

        def items(place_M: npt.NDArray[np.int64]) -> Block:
            rows = rank_input.items if len(place_M) == len(key_N) else rank_input.items.take(pa.array(place_M))
            return self._raw_ids.block(self._transform.side("item", rows, len(place_M)))

        with torch.inference_mode():
            scores_NT = torch.sigmoid(scorer.logits(request, key_N, items).to(torch.float32)).numpy()
        done = time.perf_counter_ns()
        return scores_NT, StageTimes((transformed - start_ns) // 1000, 0, (done - transformed) // 1000)

    def _sides(self, batch: Batch) -> dict[str, Tensor]:
        if self._lookup is not None:
            return self._lookup.sides(batch)
        return self._embedding.sides(batch.to(self.device.torch_device), check=False)


def raw_ids_of(bundle: Bundle) -> RawIds:
    """The bundle's dynamic tables as they turn raw ids into rows; raises BundleError where they are not what the manifest says."""
    tables = {}
    for name, id_I in bundle.ids.items():
        try:
            tables[name] = FrozenIds(name, id_I)
        except SpecError as error:
            raise BundleError(f"bundle {bundle.directory}: {error}") from None
        if len(id_I) != bundle.manifest.dynamic[name]:
            raise BundleError(f"{bundle.directory}: table {name!r} has {len(id_I)} ids, the manifest says {bundle.manifest.dynamic[name]}")
    return RawIds(bundle.spec, tables)


def lookup_of(bundle: Bundle, device: Device) -> EmbeddingCollection:
    """The lookup over the bundle's tables; on the CPU these stay mapped from their files. Raises BundleError for tables that do not fit."""
    manifest = bundle.manifest
    try:
        config = EmbeddingConfig.parse({"mode": "sparse", "sequence_length": manifest.sequence_length}, "embedding")
        tables = {
            name: _table(name, manifest.table_dtypes.get(name, "fp32"), dim, bundle.tables[name]) for name, dim in manifest.groups.items()
        }
        collection = EmbeddingCollection.of_tables(lookup_spec(bundle.spec, manifest.dynamic), tables, config)
    except SpecError as error:
        raise BundleError(f"bundle {bundle.directory}: {error}") from None
    for name, group in collection.named_groups():
        for table in manifest.dynamic:
            if bool(group.rows(torch.tensor([group.layout.rows_of(table).start])).any()):
                raise BundleError(f"bundle {bundle.directory}: row 0 of table {table!r} in {name!r}, which unknown ids read, is not zero")
    return collection.to(device.torch_device).eval()


def _table(group: str, dtype: str, dim: int, storage_VS: Tensor) -> QuantizedTable | Tensor:
    """A group's storage as lookups take it; raises SpecError where it is not what the manifest says."""
    try:
        table = QuantizedTable(check_dtype(dtype), dim, storage_VS)
    except SpecError as error:
        raise SpecError(f"tables of {group!r}: {error}") from None
    return storage_VS if table.dtype == "fp32" else table
