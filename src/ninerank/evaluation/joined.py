"""Labels that came after the ranking, joined to logged requests by request and candidate.

Shape legend: N candidates of a request, T tasks, R rows of the label file.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from typing_extensions import Self

from ninerank.errors import DataError, nearest
from ninerank.evaluation.answers import numbers
from ninerank.features.files import reading

__all__ = ["JoinStats", "Labels"]

REQUEST, CANDIDATE, INDEX, LABEL = "request_id", "candidate_id", "index", "label"
KEY_TYPES = {REQUEST: pa.string(), CANDIDATE: pa.string(), INDEX: pa.int64()}


@dataclass
class JoinStats:
    """rows: of the label file. duplicates: rows whose request and candidate came before (a positive label wins).
    labelled, unlabelled: candidates with and without a row. orphans: rows that met no candidate of the log.
    """

    rows: int = 0
    duplicates: int = 0
    labelled: int = 0
    unlabelled: int = 0
    orphans: int = 0

    def merge(self, other: Self) -> Self:
        """Of two shares of one log, which both met the whole label file: what neither met is an orphan."""
        matched = (self.rows - self.orphans) + (other.rows - other.orphans)
        self.duplicates += other.duplicates
        self.labelled += other.labelled
        self.unlabelled += other.unlabelled
        self.orphans = self.rows - matched
        return self

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


class Labels:
    """Labels of a Parquet, CSV or TSV file with columns request_id, candidate_id (or index, from 0), and one for each task.

    tasks: names of the model's first outputs, whose label columns are called the same; with one task, or none named (an endpoint does
    not tell them beforehand), `label` will do. Labels are 0 or 1.
    Raises DataError for a missing column, a null, a label outside {0, 1}, or a file that cannot be read.
    """

    def __init__(self, path: str | Path, tasks: Sequence[str] | None = None) -> None:
        self.tasks = tasks = tuple(tasks or (LABEL,))
        rows = _read(Path(path))
        names = rows.schema.names
        columns = [task if task in names or len(tasks) > 1 else LABEL for task in tasks]
        wanted = [REQUEST, CANDIDATE if CANDIDATE in names else INDEX, *columns]
        for name in wanted:
            if name not in names:
                either = {INDEX: f"{CANDIDATE!r} or {INDEX!r}", LABEL: " or ".join(dict.fromkeys((repr(tasks[0]), repr(LABEL))))}.get(
                    name, repr(name)
                )
                raise DataError(f"{path}: column {either} is missing; {nearest(name, names)}")
        for name in wanted[:2]:
            if rows.column(name).null_count:
                raise DataError(f"{path}: column {name!r} holds nulls; each row names its request and candidate")
        self._label_RT = np.stack([numbers(rows, column) for column in columns], axis=1)
        bad = np.argwhere((self._label_RT != 0) & (self._label_RT != 1))
        if len(bad):
            row, task = bad[0]
            raise DataError(f"{path}: column {columns[task]!r}, row {row}: {self._label_RT[row, task]:g} is refused; a label is 0 or 1")
        self.by_index = wanted[1] == INDEX
        requests = pc.dictionary_encode(_cast(rows, REQUEST, path))
        order = np.argsort(requests.indices.to_numpy(), kind="stable")
        bounds = np.searchsorted(requests.indices.to_numpy()[order], np.arange(len(requests.dictionary) + 1))
        self._key_R = _cast(rows, wanted[1], path).take(pa.array(order))
        self._label_RT = self._label_RT[order]
        self._rows_of = dict(zip(requests.dictionary.to_pylist(), zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True), strict=True))
        self.stats = JoinStats(rows=rows.num_rows, orphans=rows.num_rows)

    def take(self, request_id: str, candidate_ids: pa.Array | None, num_candidates: int) -> npt.NDArray[np.float64]:
        """label_NT of one request, nan where there is none; raises DataError if candidates have no ids and labels name ids.

        A request is taken once: a second one with the same id finds no labels.
        """
        label_NT = np.full((num_candidates, self._label_RT.shape[1]), np.nan)
        start, end = self._rows_of.pop(request_id, (0, 0))
        if start == end:
            self.stats.unlabelled += num_candidates
            return label_NT
        places = self._places(request_id, candidate_ids, num_candidates)
        seen: set[object] = set()
        for row, key in enumerate(self._key_R.slice(start, end - start).to_pylist(), start):
            if key in seen:
                self.stats.duplicates += 1
            seen.add(key)
            for place in places.get(key, ()):
                label_NT[place] = np.fmax(label_NT[place], self._label_RT[row])
            self.stats.orphans -= key in places
        labelled = int(np.isfinite(label_NT[:, 0]).sum())
        self.stats.labelled += labelled
        self.stats.unlabelled += num_candidates - labelled
        return label_NT

    def _places(self, request_id: str, candidate_ids: pa.Array | None, num_candidates: int) -> dict[object, list[int]]:
        if self.by_index:
            return {place: [place] for place in range(num_candidates)}
        if candidate_ids is None:
            raise DataError(
                f"request {request_id!r} was logged without candidate ids; labels need column {INDEX!r} instead of {CANDIDATE!r}"
            )
        places: dict[object, list[int]] = {}
        for place, key in enumerate(candidate_ids.cast(pa.string()).to_pylist()):
            places.setdefault(key, []).append(place)
        return places


def _read(path: Path) -> pa.RecordBatch:
    if not path.is_file():
        raise DataError(f"{path}: is no file; labels are a Parquet, CSV or TSV file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty (0 bytes); labels have at least a header")
    with reading(path, "labels"):
        if path.suffix in {".parquet", ".pq"}:
            table = pq.read_table(path)
        elif path.suffix in {".csv", ".tsv", ".txt"}:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            options = pa_csv.ConvertOptions(column_types=KEY_TYPES)
            table = pa_csv.read_csv(path, parse_options=pa_csv.ParseOptions(delimiter=delimiter), convert_options=options)
        else:
            raise DataError(f"{path}: its ending tells no format; labels are .parquet, .csv or .tsv")
        return table.combine_chunks().to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], schema=table.schema)


def _cast(rows: pa.RecordBatch, name: str, path: str | Path) -> pa.Array:
    array, wanted = rows.column(name), KEY_TYPES[name]
    try:
        return array.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{path}: column {name!r} is of type {array.type}, {wanted} is needed") from None
