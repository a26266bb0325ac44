"""Which process holds which block of which table: a plain value that travels as JSON and prints as a table."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.table import Table

__all__ = ["Block", "Machine", "Placed", "Plan"]

Kind = Literal["table_wise", "row_wise", "column_wise", "data_parallel"]
MIB = 1 << 20


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
class Machine:
    """What the plan is for. memory_bytes: of one process, for tables and their optimizer state."""

    kind: str
    world_size: int
    local_world_size: int
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """Placement of all tables over `world_size` processes; `predicted_ms` is the planner's estimate of each one's step."""

    world_size: int
    placed: tuple[Placed, ...]
    predicted_ms: tuple[float, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """What `to_json` gave."""
        data = json.loads(text)
        return cls(data["world_size"], tuple(Placed(**placed) for placed in data["placed"]), tuple(data["predicted_ms"]))

    def bytes_of(self, rank: int) -> int:
        """Bytes of values and optimizer state in process `rank`."""
        return sum(placed.bytes_of(rank, self.world_size) for placed in self.placed)

    def table(self) -> Table:
        """Who holds what: a row a table and group, then bytes and predicted load of each process."""
        ranks = range(self.world_size)
        shown = Table(title=f"tables over {self.world_size} processes", title_justify="left")
        for column in ("table", "group"):
            shown.add_column(column)
        for column in ("rows", "dim", "MiB"):
            shown.add_column(column, justify="right")
        shown.add_column("kind")
        for rank in ranks:
            shown.add_column(f"rank {rank}", justify="right")
        for placed in self.placed:
            total = sum(placed.bytes_of(rank, self.world_size) for rank in ranks)
            blocks = [_phrase(placed, rank, self.world_size) for rank in ranks]
            shown.add_row(placed.table, placed.group, f"{placed.num_rows:,}", str(placed.dim), _mib(total), placed.kind, *blocks)
        shown.add_section()
        held = [self.bytes_of(rank) for rank in ranks]
        shown.add_row("MiB in all", "", "", "", _mib(sum(held)), "", *(_mib(size) for size in held))
        shown.add_row("share of bytes", "", "", "", "", "", *_shares(held))
        if self.predicted_ms:
            shown.add_row("predicted ms a step", "", "", "", "", "", *(f"{value:.3g}" for value in self.predicted_ms))
            shown.add_row("predicted load", "", "", "", "", "", *_shares(self.predicted_ms))
        return shown


def _phrase(placed: Placed, rank: int, world_size: int) -> str:
    block = placed.block(rank, world_size)
    if block.is_empty:
        return "-"
    if placed.kind == "row_wise":
        return f"rows {block.rows.start:,}-{block.rows.stop - 1:,}"
    if placed.kind == "column_wise":
        return f"columns {block.columns.start}-{block.columns.stop - 1}"
    return "copy" if placed.kind == "data_parallel" else "all"


def _shares(values: Sequence[float]) -> Iterator[str]:
    total = sum(values)
    return (f"{value / total:.1%}" if total else "-" for value in values)


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f}"
