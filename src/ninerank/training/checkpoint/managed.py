"""Tables with a storage of their own, in a checkpoint: by id where rows come and go, as plain tensors where there is one for each id."""

from collections.abc import Mapping

from ninerank.embedding.managed import ManagedTable
from ninerank.training.checkpoint.archive import Archive
from ninerank.training.checkpoint.tree import ById, Tree

__all__ = ["managed_tree", "read_managed"]

SECTION = "managed"


def managed_tree(tables: Mapping[str, ManagedTable]) -> dict[str, Tree]:
    """All that the tables go on from, under `managed.<table>`."""
    states = {name: table.state() for name, table in tables.items()}
    return {SECTION: {name: ById(state) if "id" in state else state for name, state in states.items()}}


def read_managed(archive: Archive, tables: Mapping[str, ManagedTable]) -> None:
    """Take what `managed_tree` gave; raises CheckpointError for a table that is not there, or does not fit."""
    for name, table in tables.items():
        full = f"{SECTION}.{name}"
        is_by_id = archive.is_by_id(full) or not archive.has(full)
        table.load_state(archive.by_id(full) if is_by_id else archive.section(full, into=table.state()))
