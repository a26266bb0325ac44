"""Which process holds which block of which table: a plain value that travels as JSON and prints as a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.console import Group
from rich.table import Table

__all__ = ["Apart", "Block", "Machine", "Placed", "Plan"]

Kind = Literal["table_wise", "row_wise", "column_wise", "data_parallel"]
MIB = 1 << 20
MOST_RANKS_SHOWN = 16


@dataclass(frozen=True)
class Block:
    """Rows and columns of a table."""

    rows: range
    columns: range

    @property
    def is_empty(self) -> bool:
        return not (self.rows and self.columns)


@dataclass(frozen=True)
class Placed:
    """One table at one group's dim, and where it lies.

    rank: the process of a table-wise table, None for other kinds. row_bytes: values and optimizer state of one row.
    """

    table: str
    group: str
    num_rows: int
    dim: int
    kind: Kind
    rank: int | None
    row_bytes: int

    def block(self, rank: int, world_size: int) -> Block:
        """What process `rank` holds; row-wise blocks have ceil(rows / W) rows, so that the last ones may be smaller or empty.

        >>> Placed("item", "deep", 10, 4, "row_wise", None, 32).block(2, 3)
        Block(rows=range(8, 10), columns=range(0, 4))
        """
        rows, columns = range(self.num_rows), range(self.dim)
        if self.kind == "row_wise":
            size = -(-self.num_rows // world_size)
            rows = range(min(rank * size, self.num_rows), min((rank + 1) * size, self.num_rows))
        elif self.kind == "column_wise":
            size = self.dim // world_size
            columns = range(rank * size, (rank + 1) * size)
        elif self.kind == "table_wise" and rank != self.rank:
            rows = range(0)
        return Block(rows, columns)

    def bytes_of(self, rank: int, world_size: int) -> int:
        """Bytes that the block of `rank` takes."""
        block = self.block(rank, world_size)
        return len(block.rows) * self.row_bytes * len(block.columns) // self.dim


@dataclass(frozen=True)
class Apart:
    """A table at one group's dim that the planner does not place: every process holds a part of it.

    kind: `by_id` for a dynamic one, whose rows come and go with their ids (num_rows is 0), `tiered` for one in blocks of rows on the hosts.
    row_bytes: values and optimizer state of one row.
    """

    table: str
    group: str
    dim: int
    row_bytes: int
    kind: Literal["by_id", "tiered"] = "by_id"
    num_rows: int = 0


@dataclass(frozen=True)
class Machine:
    """What the plan is for. memory_bytes: of one process, for tables and their optimizer state."""

    kind: str
    world_size: int
    local_world_size: int
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """Placement of all tables over `world_size` processes; `predicted_ms` is the planner's estimate of each one's step.

    placed: static tables. apart: dynamic and tiered ones, which count in neither bytes nor estimate.
    """

    world_size: int
    placed: tuple[Placed, ...]
    predicted_ms: tuple[float, ...] = ()
    apart: tuple[Apart, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """What `to_json` gave."""
        data = json.loads(text)
        apart = tuple(Apart(**table) for table in data["apart"])
        return cls(data["world_size"], tuple(Placed(**placed) for placed in data["placed"]), tuple(data["predicted_ms"]), apart)

    def bytes_of(self, rank: int) -> int:
        """Bytes of values and optimizer state in process `rank`."""
        return sum(placed.bytes_of(rank, self.world_size) for placed in self.placed)

    def tables(self) -> Group:
        """To be printed: who holds what, then bytes and predicted load of each process (of many, the least and the most loaded)."""
        return Group(self._placements(), self._loads())

    def _placements(self) -> Table:
        shown = Table(title=f"tables over {self.world_size} processes", title_justify="left")
        shown.add_column("table")
        shown.add_column("group")
        for column in ("rows", "dim", "MiB"):
            shown.add_column(column, justify="right")
        shown.add_column("kind", no_wrap=True)
        shown.add_column("held by")
        for placed in self.placed:
            size = sum(placed.bytes_of(rank, self.world_size) for rank in range(self.world_size))
            shown.add_row(
                placed.table, placed.group, f"{placed.num_rows:,}", str(placed.dim), _mib(size), placed.kind, self._held_by(placed)
            )
        for each in self.apart:
            shown.add_row(each.table, each.group, *self._apart(each))
        return shown

    def _apart(self, each: Apart) -> tuple[str, ...]:
        if each.kind == "by_id":
            return "grows", str(each.dim), f"{each.row_bytes} B a row", each.kind, "all, by a hash of the id"
        held_by = f"all, {-(-each.num_rows // self.world_size):,} rows each, on the host"
        return f"{each.num_rows:,}", str(each.dim), _mib(each.num_rows * each.row_bytes), each.kind, held_by

    def _held_by(self, placed: Placed) -> str:
        first = placed.block(0, self.world_size)
        if placed.kind == "row_wise":
            return f"all, {len(first.rows):,} rows each"
        if placed.kind == "column_wise":
            return f"all, {len(first.columns)} columns each"
        return "all, a copy each" if placed.kind == "data_parallel" else f"rank {placed.rank}"

    def _loads(self) -> Table:
        held = [self.bytes_of(rank) for rank in range(self.world_size)]
        shown = Table(title="load of processes", title_justify="left")
        shown.add_column("rank")
        for column in ("MiB", "share of bytes", "predicted ms a step", "share of time"):
            shown.add_column(column, justify="right")
        ranks = list(range(self.world_size))
        if self.world_size > MOST_RANKS_SHOWN:
            by_load = sorted(ranks, key=lambda rank: (self.predicted_ms[rank] if self.predicted_ms else 0.0, held[rank]))
            ranks = sorted({by_load[0], by_load[len(by_load) // 2], by_load[-1]})
        for rank in ranks:
            time = (f"{self.predicted_ms[rank]:.3g}", _share(rank, self.predicted_ms)) if self.predicted_ms else ("-", "-")
            shown.add_row(str(rank), _mib(held[rank]), _share(rank, held), *time)
        shown.add_section()
        shown.add_row("all", _mib(sum(held)), "", "", "")
        return shown


def _share(rank: int, values: Sequence[float]) -> str:
    total = sum(values)
    return f"{values[rank] / total:.1%}" if total else "-"


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f}"
