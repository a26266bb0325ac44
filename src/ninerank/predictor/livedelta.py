"""Changes of embedding rows that reach a live model without a reload.

`<version>.deltas/` holds what `embedding.delta.DeltaWriter` writes: `base-<version>` as of the bundle's export, then
`delta-<version>-000001` and so on, with the columns `value.<group>`. A delta becomes a new set of tables beside the old one, in the
bundle's own storage type, and an engine over it that shares the graph; the registry swaps them as it swaps versions: a request sees all of
a delta or nothing of it. Rows are stored as a full export would store them, bit for bit. What does not follow (a gap, a repeat, another
base, a damaged file) is refused, and the rows that are served stay.

Shape legend: V rows of a group, S what a row is stored in, K rows of a delta, I ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ninerank.embedding.changes import Changes, RowBlock
from ninerank.embedding.delta import Delta, Position, base_position, delta_path, merge_rows
from ninerank.embedding.quantize import check_dtype, quantize_group
from ninerank.embedding.table import TableLayout
from ninerank.errors import BundleError, DataError
from ninerank.features.encoding import MISSING_ID
from ninerank.predictor.bundle import Bundle

__all__ = ["LiveRows"]

VALUE = "value."


@dataclass(frozen=True)
class LiveRows:
    """A bundle with the deltas applied that came so far; immutable."""

    bundle: Bundle
    position: Position

    @classmethod
    def begin(cls, bundle: Bundle, directory: Path) -> "LiveRows":
        """Where the deltas of `directory` start; raises BundleError where it holds no base of the bundle's version."""
        return cls(bundle, base_position(directory / f"base-{bundle.manifest.model_version}"))

    def has_next(self, directory: Path) -> bool:
        """Whether the next delta is there."""
        return delta_path(directory, self.position).is_dir()

    def follow(self, directory: Path) -> "LiveRows":
        """With the next delta applied; raises BundleError, and these rows stay as they are."""
        path = delta_path(directory, self.position)
        delta = Delta.read(path, self.position)
        return LiveRows(_applied(self.bundle, delta.changes, path), delta.following(self.position))


def _applied(bundle: Bundle, changes: Mapping[str, Changes], path: Path) -> Bundle:
    """The bundle with new tables and ids; its files stay as they are."""
    spec, manifest = bundle.spec, bundle.manifest
    if changes.keys() != spec.tables.keys():
        raise BundleError(f"{path}: holds the tables {sorted(changes)}, the bundle {sorted(spec.tables)}")
    sizes = {name: 1 + manifest.dynamic[name] if table.is_dynamic else table.num_rows for name, table in spec.tables.items()}
    layout = TableLayout.of(sizes)
    ids = dict(bundle.ids)
    stored: dict[str, list[Tensor]] = {group: [] for group in manifest.groups}
    for name, table in spec.tables.items():
        for group, dim in manifest.groups.items():
            storage_VS = bundle.tables[group][layout.rows_of(name)]
            own = _stored(changes[name], group, dim, manifest.table_dtypes.get(group, "fp32"), f"{path}: table {name!r}")
            if table.is_dynamic:
                merged, id_I = _merged(storage_VS, bundle.ids[name], own, path, name)
                ids[name] = id_I
            else:
                merged = _overwritten(storage_VS, own, path, name)
            stored[group].append(merged)
    tables = {group: torch.cat(parts) for group, parts in stored.items()}
    counts = {name: len(id_I) for name, id_I in ids.items()}
    return replace(bundle, tables=tables, ids=ids, manifest=manifest.model_copy(update={"dynamic": counts}))


@dataclass(frozen=True)
class _Stored:
    """Changed rows of one table and group as they are stored."""

    ids: npt.NDArray[np.int64]
    row_KS: Tensor
    removed: npt.NDArray[np.int64]


def _stored(changes: Changes, group: str, dim: int, dtype: str, what: str) -> _Stored:
    values = changes.upserts.columns.get(VALUE + group)
    if values is None or values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != dim:
        held = "is missing" if values is None else f"is {values.dtype} {values.shape[1:]}"
        raise BundleError(f"{what}: column {VALUE + group!r} {held}; float32 rows of {dim} numbers are needed")
    row_KD = torch.from_numpy(np.ascontiguousarray(values))
    try:
        table = quantize_group(row_KD, TableLayout.of({"delta": len(row_KD)}), check_dtype(dtype), name=group)
    except DataError as error:
        raise BundleError(f"{what}: {error}") from None
    return _Stored(changes.upserts.ids, table.storage_VS, changes.removed)


def _overwritten(storage_VS: Tensor, own: _Stored, path: Path, name: str) -> Tensor:
    if len(own.removed):
        raise BundleError(f"{path}: table {name!r} has a fixed size, row {int(own.removed[0])} cannot be gone")
    if len(own.ids) and not 0 <= int(own.ids[0]) <= int(own.ids[-1]) < len(storage_VS):
        raise BundleError(f"{path}: table {name!r} has {len(storage_VS)} rows, the delta names {int(own.ids[0])} to {int(own.ids[-1])}")
    if not len(own.ids):
        return storage_VS
    written = storage_VS.clone()
    written[torch.from_numpy(own.ids)] = own.row_KS
    return written


def _merged(storage_VS: Tensor, id_I: Tensor, own: _Stored, path: Path, name: str) -> tuple[Tensor, Tensor]:
    """Rows of a dynamic table, the zero row first, and their ids."""
    known = own.ids != MISSING_ID  # which reads row 0, the row of zeros
    rows = RowBlock(id_I.numpy(), {"row": storage_VS[1:].numpy()})
    changes = Changes(RowBlock(own.ids[known], {"row": own.row_KS.numpy()[known]}), own.removed)
    found = merge_rows(rows, changes)
    return torch.cat([storage_VS[:1], torch.from_numpy(found.columns["row"])]), torch.from_numpy(found.ids)
