"""Incremental export: a base of all rows, then numbered deltas of the rows that changed, each a directory.

    base-<version>/            manifest.json, one Arrow file per table with all its rows
    delta-<version>-000001/    manifest.json, per table the rows that changed (upserts) and the ids that are gone (tombstones)

A manifest carries the SHA-256 of every file, its own, and that of the manifest before it, so that deltas form a chain from one base: a
gap, a repeat, another base or another history of the same base is told from the manifest alone. Directories are written under a
temporary name, synced and renamed. `Replica.apply` checks everything before it makes a new replica; the old one is never changed.

Rows are named by id: the raw id of a dynamic table, the row number of a static one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ninerank.config import Config
from ninerank.embedding.changes import Changes, Column, DeltaSource, Ints, RowBlock, column_of
from ninerank.embedding.rowfile import RowFile, read_manifest, read_rows, seal, sealing, write_rows
from ninerank.errors import BundleError

__all__ = ["Delta", "DeltaWriter", "Position", "Replica", "base_position", "delta_path", "merge_rows"]

FORMAT: Literal[1] = 1
VERSION_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]{0,63}")


class BaseManifest(Config):
    """All rows of each table."""

    format: Literal[1] = FORMAT
    kind: Literal["base"] = "base"
    version: str
    tables: dict[str, RowFile]


class ChangedTable(Config):
    """Rows that are new or differ, and ids that are gone."""

    upserts: RowFile
    removed: RowFile


class DeltaManifest(Config):
    """Number `sequence` after base `version`, whose manifest has the digest `base_sha256`; `parent` is the digest of the one before."""

    format: Literal[1] = FORMAT
    kind: Literal["delta"] = "delta"
    version: str
    base_sha256: str
    sequence: int
    parent: str
    tables: dict[str, ChangedTable]


@dataclass(frozen=True)
class Position:
    """Where in a chain one stands: the base, the number of deltas applied, and the digest of the last manifest."""

    version: str
    base_sha256: str
    sequence: int
    sha256: str

    def check_next(self, manifest: DeltaManifest, what: Path) -> None:
        """Raise BundleError unless `manifest` is that of the very next delta."""
        if (manifest.version, manifest.base_sha256) != (self.version, self.base_sha256):
            raise BundleError(
                f"{what}: wrong base: the delta stands on {manifest.version!r} ({manifest.base_sha256[:12]}), "
                f"what is loaded on {self.version!r} ({self.base_sha256[:12]})"
            )
        if manifest.sequence <= self.sequence:
            raise BundleError(f"{what}: repeat: delta {manifest.sequence} of {self.version!r}, {self.sequence} were applied already")
        if manifest.sequence > self.sequence + 1:
            raise BundleError(f"{what}: gap: delta {manifest.sequence} of {self.version!r}, the next one is {self.sequence + 1}")
        if manifest.parent != self.sha256:
            raise BundleError(
                f"{what}: wrong history: delta {manifest.sequence} follows manifest {manifest.parent[:12]}, "
                f"what is loaded is at {self.sha256[:12]}"
            )


class DeltaWriter:
    """Publishes the bases and deltas of one set of tables into a directory.

    Call between steps. A delta that could not be written is made up for by the next one: what changed is forgotten only after the rename.
    """

    def __init__(self, directory: str | Path, tables: Mapping[str, DeltaSource]) -> None:
        self.directory = Path(directory)
        self.tables = dict(tables)
        self.position: Position | None = None
        self._published: dict[str, int] = {}
        self._generations: dict[str, int] = {}

    def base(self, version: str) -> Path:
        """Write all rows as base `version` (letters, digits, dots and underscores); deltas follow it. Raises BundleError."""
        if not VERSION_PATTERN.fullmatch(version):
            raise BundleError(f"base version {version!r}: 1 to 64 letters, digits, '.' or '_' are needed, the first a letter or digit")
        closed = {name: source.advance() for name, source in self.tables.items()}
        target = self.directory / f"base-{version}"
        with sealing(target) as temporary:
            tables = {
                name: write_rows(temporary, f"table-{i}.rows.arrow", source.columns, source.blocks())
                for i, (name, source) in enumerate(self.tables.items())
            }
            digest = seal(temporary, BaseManifest(version=version, tables=tables))
        self.position = Position(version, digest, 0, digest)
        self._published = closed
        self._generations = {name: source.generation for name, source in self.tables.items()}
        for name, source in self.tables.items():
            source.forget(closed[name])
        return target

    def delta(self) -> Path:
        """Write what changed since the last base or delta. Raises BundleError without a base, or after a table was replaced as a whole."""
        position = self.position
        if position is None:
            raise BundleError(f"{self.directory}: no base was written yet; deltas stand on one")
        for name, source in self.tables.items():
            if source.generation != self._generations[name]:
                raise BundleError(f"table {name!r} was loaded anew after base {position.version!r}: write a new base")
        closed = {name: source.advance() for name, source in self.tables.items()}
        sequence = position.sequence + 1
        target = self.directory / _delta_name(position.version, sequence)
        with sealing(target) as temporary:
            tables = {}
            for i, (name, source) in enumerate(self.tables.items()):
                changes = source.changes(self._published[name])
                tables[name] = ChangedTable(
                    upserts=write_rows(temporary, f"table-{i}.rows.arrow", source.columns, [changes.upserts]),
                    removed=write_rows(temporary, f"table-{i}.removed.arrow", {}, [RowBlock(changes.removed, {})]),
                )
            manifest = DeltaManifest(
                version=position.version, base_sha256=position.base_sha256, sequence=sequence, parent=position.sha256, tables=tables
            )
            digest = seal(temporary, manifest)
        self.position = Position(position.version, position.base_sha256, sequence, digest)
        self._published = closed
        return target


@dataclass(frozen=True)
class Delta:
    """A delta that was read and checked: its files are whole and mean something; whether it fits is for a `Position` to say."""

    manifest: DeltaManifest
    sha256: str
    changes: Mapping[str, Changes]

    @classmethod
    def read(cls, path: str | Path, position: Position) -> "Delta":
        """Read the delta after `position`; raises BundleError for one that does not follow, is truncated, corrupt or makes no sense."""
        path = Path(path)
        manifest, digest = read_manifest(path, DeltaManifest, "delta", FORMAT)
        position.check_next(manifest, path)
        changes = {}
        for name, table in manifest.tables.items():
            upserts, removed = read_rows(path, table.upserts), read_rows(path, table.removed).ids
            both = np.intersect1d(upserts.ids, removed, assume_unique=True)
            if len(both):
                raise BundleError(f"{path}: table {name!r}: id {int(both[0])} is both changed and gone")
            changes[name] = Changes(upserts, removed)
        return cls(manifest, digest, changes)

    def following(self, position: Position) -> Position:
        """Where one stands after this delta."""
        return Position(position.version, position.base_sha256, position.sequence + 1, self.sha256)


@dataclass(frozen=True)
class Replica:
    """Tables as of a base and the deltas applied to it; immutable."""

    position: Position
    tables: Mapping[str, RowBlock]

    @classmethod
    def load(cls, path: str | Path) -> "Replica":
        """Read a base; raises BundleError if it is missing, truncated or corrupt."""
        path = Path(path)
        manifest, digest = read_manifest(path, BaseManifest, "base", FORMAT)
        tables = {name: read_rows(path, entry) for name, entry in manifest.tables.items()}
        return cls(Position(manifest.version, digest, 0, digest), tables)

    def apply(self, path: str | Path) -> "Replica":
        """Replica with one more delta; raises BundleError, and this replica stays as it is either way."""
        delta = Delta.read(path, self.position)
        if delta.changes.keys() != self.tables.keys():
            raise BundleError(f"{path}: holds the tables {sorted(delta.changes)}, the base {sorted(self.tables)}")
        for name, changes in delta.changes.items():
            own, theirs = _columns(self.tables[name]), _columns(changes.upserts)
            if own != theirs:
                raise BundleError(f"{path}: table {name!r} has the columns {theirs}, in the base they are {own}")
        merged = {name: merge_rows(self.tables[name], changes) for name, changes in delta.changes.items()}
        return Replica(delta.following(self.position), merged)

    def follow(self, directory: str | Path) -> "Replica":
        """Replica with all deltas applied that lie in `directory` and come next, one after the other."""
        replica = self
        while (path := delta_path(directory, replica.position)).is_dir():
            replica = replica.apply(path)
        return replica


def base_position(path: str | Path) -> Position:
    """Where one stands at the base in directory `path`; its rows are not read. Raises BundleError."""
    manifest, digest = read_manifest(Path(path), BaseManifest, "base", FORMAT)
    return Position(manifest.version, digest, 0, digest)


def delta_path(directory: str | Path, position: Position) -> Path:
    """Where the delta after `position` is or will be."""
    return Path(directory) / _delta_name(position.version, position.sequence + 1)


def merge_rows(rows: RowBlock, changes: Changes) -> RowBlock:
    """Rows after changes, in rising order of their ids; `rows` stays as it is."""
    upserts, removed = changes
    if len(upserts.ids) == 0 and len(removed) == 0:
        return rows
    place, is_known = _places(rows.ids, upserts.ids)
    gone, is_gone = _places(rows.ids, removed)
    if is_known.all() and not is_gone.any():
        columns = {name: column.copy() for name, column in rows.columns.items()}
        for name, column in columns.items():
            column[place] = upserts.columns[name]
        return RowBlock(rows.ids, columns)
    kept = np.ones(len(rows.ids), np.bool_)
    kept[place[is_known]] = False
    kept[gone[is_gone]] = False
    ids = np.concatenate([rows.ids[kept], upserts.ids])
    order = np.argsort(ids, kind="stable")  # two rising runs: one pass
    merged = {name: np.concatenate([column[kept], upserts.columns[name]])[order] for name, column in rows.columns.items()}
    return RowBlock(ids[order], merged)


def _places(ids: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    place = np.searchsorted(ids, wanted)
    found = place < len(ids)
    found[found] = ids[place[found]] == wanted[found]
    return place, found


def _columns(rows: RowBlock) -> dict[str, Column]:
    return {name: column_of(values) for name, values in rows.columns.items()}


def _delta_name(version: str, sequence: int) -> str:
    return f"delta-{version}-{sequence:06d}"
