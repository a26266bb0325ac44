"""What is served: a directory of files with checksums, a spec digest and golden scores.

    manifest.json          model, version, SHA-256 and size of every other file, versions of what made it
    spec.json              the feature spec with its fitted state
    graph.json             the dense graph, compiled (see graph.py and fusion)
    weights.safetensors    the graph's weights
    source.json            the dense graph before the compiler, what other backends and later versions start from
    source.safetensors     weights that it reads besides
    tables/<group>.safetensors   the merged embedding tables of one group, mapped into memory when loaded
    ids/<table>.safetensors      the raw ids of a dynamic table in rising order: id i has row i + 1 of the table
    golden.parquet         rows with the scores that the trained model gave them

It is written to a temporary name beside its place, synced, tried out, and renamed. Nothing in it is ever unpickled.

Shape legend: B rows, T tasks, V rows of a merged table, D embedding dim.
"""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ninerank import __version__
from ninerank.device import Device
from ninerank.embedding.collection import EmbeddingCollection
from ninerank.embedding.dynamic.frozen import freeze
from ninerank.embedding.quantize import TableDtype, check_dtype, quantize_group
from ninerank.embedding.table import TableLayout
from ninerank.errors import BundleError, DataError, SpecError
from ninerank.features.batch import Batch
from ninerank.features.spec import FeatureSpec, Side
from ninerank.features.transform import Transform
from ninerank.files import creating
from ninerank.fusion.capture import capture
from ninerank.fusion.compile import CompiledGraph, compile_graph
from ninerank.fusion.roles import USER_ROW
from ninerank.predictor.graph import DenseGraph, describe_graph
from ninerank.predictor.manifest import FileEntry, Manifest, check_label, hash_file
from ninerank.predictor.request import RequestSchema
from ninerank.towers.model import RankingModel
from ninerank.towers.sides import SidedTower, graph_inputs

if TYPE_CHECKING:
    from ninerank.predictor.engine import Engine

__all__ = ["ROUNDING_TOLERANCE", "Bundle", "Golden", "export_bundle"]

# Largest differences of scores: what rounding alone makes of them from machine to machine, and beyond what tables of each type are no
# rounding any more but a mistake. Models with steep scores were seen to move by 2e-3, 2e-2 and 0.35 (docs/quantised.md).
ROUNDING_TOLERANCE = 1e-5
MOST_DIFFERENCE: dict[TableDtype, float] = {"fp32": 1e-5, "fp16": 1e-2, "int8": 1e-1, "int4": 0.5}
SPEC, GRAPH, WEIGHTS, GOLDEN = "spec.json", "graph.json", "weights.safetensors", "golden.parquet"
SOURCE, SOURCE_WEIGHTS = "source.json", "source.safetensors"
TABLES, IDS = "tables", "ids"


@dataclass(frozen=True)
class Golden:
    """Rows in the columns of the request schema, and scores_BT that the trained model gave them."""

    rows: pa.RecordBatch
    scores_BT: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bundle:
    """A bundle whose checksums and digest hold; its golden scores are checked by the engine that will serve it.

    graph: compiled; source: before the compiler. tables: (V, D) of each group, or what it is quantised to, mapped from the file.
    ids: int64 (I,) of each dynamic table, mapped too.
    """

    directory: Path
    manifest: Manifest
    spec: FeatureSpec
    graph: DenseGraph
    source: DenseGraph
    tables: dict[str, Tensor]
    ids: dict[str, Tensor]
    golden: Golden

    @classmethod
    def load(cls, directory: str | Path) -> "Bundle":
        """Read and verify a bundle.

        Raises BundleError, naming the file, for one that is missing, unknown, of another size or checksum, or unreadable, and for a
        spec whose digest is not the manifest's.
        """
        root = Path(directory)
        if not root.is_dir():
            raise BundleError(f"{root}: is no directory; a bundle is the directory that `ninerank export` writes")
        manifest = Manifest.read(root)
        manifest.verify(root)
        try:
            spec = FeatureSpec.load(root / SPEC)
        except SpecError as error:
            raise BundleError(str(error)) from None
        if spec.digest != manifest.spec_digest:
            raise BundleError(f"{root / SPEC}: has digest {spec.digest}, the bundle was made for {manifest.spec_digest}")
        weights = _read_tensors(root / WEIGHTS)
        graph = DenseGraph(_read_text(root / GRAPH), weights)
        source = DenseGraph(_read_text(root / SOURCE), {**weights, **_read_tensors(root / SOURCE_WEIGHTS)})
        tables = {group: _read_tensor(root / TABLES / f"{group}.safetensors", "rows") for group in manifest.groups}
        dynamic = {name for name, table in spec.tables.items() if table.is_dynamic}
        if manifest.dynamic.keys() != dynamic:
            raise BundleError(f"{root}: holds ids of the tables {sorted(manifest.dynamic)}, dynamic in the spec are {sorted(dynamic)}")
        ids = {table: _read_tensor(root / IDS / f"{table}.safetensors", "ids") for table in manifest.dynamic}
        golden = _read_golden(root / GOLDEN, spec)
        return cls(root, manifest, spec, graph, source, tables, ids, golden)


def export_bundle(
    model: RankingModel,
    spec: FeatureSpec,
    golden: pa.RecordBatch,
    out_dir: str | Path,
    *,
    model_name: str,
    version: str,
    tables: str = "fp32",
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Write `model` as a bundle to `out_dir`, which must not exist yet, and return its manifest.

    golden: rows with the spec's columns (labels and others are left out); their scores under `model` go into the bundle, and the
    finished bundle is loaded and must give them again before it gets its name. tables: what tables are stored in, fp32, fp16, int8 or
    int4; the largest difference that it makes of a golden score is written down, and is what the bundle is held to from then on.
    progress: called with what is being done. Raises BundleError where golden scores move by more than MOST_DIFFERENCE, where `out_dir`
    exists, where a table holds numbers that are not finite, or where the tower cannot be exported; SpecError for another `tables`.
    """
    from ninerank.predictor.engine import Engine  # the engine reads bundles, this is the one place that looks the other way

    out = Path(out_dir)
    if out.exists():
        raise BundleError(f"{out}: exists already; a bundle is never overwritten, choose another place")
    check_label("model name", model_name)
    check_label("model version", version)
    dtype = check_dtype(tables)
    say = progress or (lambda _: None)
    was_training = model.training
    model.eval()
    try:
        with creating(out) as directory:
            say("scoring golden rows")
            rows = _golden_rows(spec, golden)
            batch = model.embedding.prepare(Transform(spec).batch(rows, labels=False)).to(next(model.parameters()).device)
            with torch.inference_mode():
                scores_BT = torch.sigmoid(model.tower(model.embedding(batch, pad=True))).to(torch.float32).cpu().numpy()
            compiled = _write_graphs(directory, model, spec, batch, say)
            say("writing tables")
            spec.save(directory / SPEC)
            stored, ids = _write_tables(directory, model.embedding, spec, dtype)
            _write_golden(directory / GOLDEN, rows, scores_BT)
            manifest = Manifest(
                model_name=model_name,
                model_version=version,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                spec_digest=spec.digest,
                tasks=spec.labels,
                groups=model.embedding.dims,
                dynamic={name: len(id_I) for name, id_I in ids.items()},
                sequence_length=model.embedding.config.padding,
                table_dtypes=stored,
                passes=compiled.records,
                graph_before=compiled.before,
                graph_after=compiled.after,
                golden_tolerance=MOST_DIFFERENCE[dtype],
                versions=_versions(),
                files=_entries(directory),
            )
            manifest.write(directory)
            say("checking the finished bundle")
            bundle = Bundle.load(directory)
            difference = _difference(Engine(bundle, Device.resolve("cpu")), bundle, dtype)
            tolerance = ROUNDING_TOLERANCE if dtype == "fp32" else difference + ROUNDING_TOLERANCE
            manifest = manifest.model_copy(update={"golden_difference": difference, "golden_tolerance": tolerance})
            manifest.write(directory)
    finally:
        model.train(was_training)
    return manifest


def _write_graphs(directory: Path, model: RankingModel, spec: FeatureSpec, batch: Batch, say: Callable[[str], None]) -> CompiledGraph:
    """Capture the tower over apart sides, compile it, and write the graph before and after."""
    say("capturing the dense graph")
    with torch.inference_mode():
        rows = {key: value.cpu().clone() for key, value in model.embedding.sides(batch).items()}
    sequences = spec.sequence_keys("request")
    inputs = graph_inputs(rows, sequences)
    source = capture(SidedTower(model.tower, tuple(model.embedding.dims), sequences), inputs)
    say("compiling the dense graph")
    of_one = {given.name: rows[given.name][:1] if given.role == "request" else rows[given.name] for given in inputs}
    compiled = compile_graph(source, [rows, {**of_one, USER_ROW: torch.zeros_like(rows[USER_ROW])}])
    before, after = describe_graph(source), describe_graph(compiled.module)
    (directory / GRAPH).write_text(after.text, encoding="utf-8")
    (directory / SOURCE).write_text(before.text, encoding="utf-8")
    save_file(after.weights, directory / WEIGHTS)
    others = {name: value for name, value in before.weights.items() if not _is_same(value, after.weights.get(name))}
    save_file(others, directory / SOURCE_WEIGHTS)
    return compiled


def _is_same(first: Tensor, second: Tensor | None) -> bool:
    return second is not None and first.dtype == second.dtype and torch.equal(first, second)


def _write_tables(
    directory: Path, collection: EmbeddingCollection, spec: FeatureSpec, dtype: TableDtype
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Write the rows of all tables in spec order, one file a group, and the ids of dynamic ones.

    Returns what each group is stored in, and the ids. Raises BundleError for rows that `dtype` cannot hold.
    """
    (directory / TABLES).mkdir()
    stored: dict[str, str] = {}
    frozen = {name: freeze(table.values_state()) for name, table in collection.managed.items()}
    for name, group in collection.named_groups():
        rows_VD, layout = group.storage.detach().to("cpu", torch.float32), group.layout
        if frozen:
            parts = {own: frozen[own][1][name] if own in frozen else rows_VD[layout.rows_of(own)] for own in spec.tables}
            rows_VD, layout = torch.cat(list(parts.values())), TableLayout.of({own: len(part_VD) for own, part_VD in parts.items()})
        try:
            table = quantize_group(rows_VD, layout, dtype, name=name)
        except DataError as error:
            raise BundleError(f"{error}; the model is not exported") from None
        save_file({"rows": table.storage_VS}, directory / TABLES / f"{name}.safetensors")
        stored[name] = table.dtype
    ids = {name: id_I for name, (id_I, _) in frozen.items()}
    if ids:
        (directory / IDS).mkdir()
    for name, id_I in ids.items():
        save_file({"ids": id_I.contiguous()}, directory / IDS / f"{name}.safetensors")
    return stored, ids


def _difference(engine: "Engine", bundle: Bundle, dtype: TableDtype) -> float:
    try:
        return engine.check_golden(bundle)
    except BundleError as error:
        raise BundleError(f"{error}{'' if dtype == 'fp32' else f'; tables in {dtype} may be too coarse for this model'}") from None


def _golden_rows(spec: FeatureSpec, rows: pa.RecordBatch) -> pa.RecordBatch:
    """The spec's columns, in the types that requests have, so that the file holds what the model saw."""
    if rows.num_rows == 0:
        raise BundleError("a bundle needs at least one golden row")
    schema = RequestSchema.of(spec)
    given = dict(zip(rows.schema.names, rows.columns, strict=True))
    columns: dict[str, pa.Array] = {}
    sides: tuple[Side, ...] = ("request", "item")
    for side in sides:
        own = {name: array for name, array in given.items() if name in schema.side(side).names}
        batch, missing = schema.conform(side, own, rows.num_rows)
        if missing:
            raise BundleError(f"golden rows lack the columns {', '.join(missing)} of the spec")
        columns |= dict(zip(batch.schema.names, batch.columns, strict=True))
    return pa.RecordBatch.from_pydict(columns)


def _write_golden(file: Path, rows: pa.RecordBatch, scores_BT: npt.NDArray[np.float32]) -> None:
    scores = pa.FixedSizeListArray.from_arrays(pa.array(scores_BT.reshape(-1)), scores_BT.shape[1])
    features = pa.StructArray.from_arrays(rows.columns, fields=list(rows.schema))
    pq.write_table(pa.table({"features": features, "scores": scores}), file)


def _read_golden(file: Path, spec: FeatureSpec) -> Golden:
    with _naming(file), pq.ParquetFile(file) as opened:  # read_table would load pandas, where there is one, for half a second
        (batch,) = opened.read(columns=["features", "scores"]).combine_chunks().to_batches()
        features = batch.column("features")
        rows = pa.RecordBatch.from_arrays(features.flatten(), names=[field.name for field in features.type])
        scores_BT = batch.column("scores").flatten().to_numpy().reshape(len(features), -1)
    if scores_BT.shape[1] != len(spec.labels):
        raise BundleError(f"{file}: holds scores of {scores_BT.shape[1]} tasks, the spec has {len(spec.labels)}")
    return Golden(rows, scores_BT)


def _read_text(file: Path) -> str:
    with _naming(file):
        return file.read_text(encoding="utf-8")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors that share the file's mapping into memory: read when touched, copied when written to."""
    with _naming(file), safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def _read_tensor(file: Path, name: str) -> Tensor:
    """The one tensor of a file, as `_read_tensors` gives it."""
    loaded = _read_tensors(file)
    if loaded.keys() != {name}:
        raise BundleError(f"{file}: holds {sorted(loaded)}, exactly {name!r} is needed")
    return loaded[name]


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn whatever a reader of `file` raises into a BundleError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:  # Arrow's errors are ValueErrors
        raise BundleError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None


def _entries(directory: Path) -> dict[str, FileEntry]:
    files: dict[str, FileEntry] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            path.chmod(0o644)  # whoever exports is often not who serves, and some writers make files for their owner alone
            files[path.relative_to(directory).as_posix()] = hash_file(path)
    return files


def _versions() -> dict[str, str]:
    modules: tuple[Any, ...] = (torch, np, pa)
    return {"ninerank": __version__, "python": platform.python_version(), **{m.__name__: str(m.__version__) for m in modules}}
