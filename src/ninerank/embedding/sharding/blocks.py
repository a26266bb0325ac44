"""Tables cut into blocks of rows, one a process: where a block lies, who owns an id, and the block's columns in a checkpoint."""

from dataclasses import dataclass

import numpy as np

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.shard import Shard
from ninerank.embedding.tiers.table import TieredTable
from ninerank.errors import DataError

__all__ = ["RowBlocks", "shards_of"]


@dataclass(frozen=True)
class RowBlocks:
    """Blocks of ceil(rows / W) rows; the last ones may be smaller or empty.

    >>> blocks = RowBlocks("item", 10, 3)
    >>> blocks.of(2), blocks.owner_of(np.array([0, 3, 4, 9])).tolist()
    (range(8, 10), [0, 0, 1, 2])
    """

    table: str
    num_rows: int
    world_size: int

    @property
    def size(self) -> int:
        """Rows of the first block."""
        return -(-self.num_rows // self.world_size)

    def of(self, rank: int) -> range:
        """Rows of a process."""
        return range(min(rank * self.size, self.num_rows), min((rank + 1) * self.size, self.num_rows))

    def owner_of(self, ids: Ints) -> Ints:
        """Process of each id; raises DataError for ids outside the table."""
        is_wrong = (ids < 0) | (ids >= self.num_rows)
        if is_wrong.any():
            wrong, last = int(ids[np.argmax(is_wrong)]), self.num_rows - 1
            raise DataError(f"table {self.table!r}: id {wrong} is outside its {self.num_rows} rows (valid: 0 to {last})")
        return ids // self.size


def shards_of(table: TieredTable, num_rows: int, *, reading: bool) -> dict[str, Shard]:
    """Columns of this process's block of a table of `num_rows`, as `TieredTable.state` names them; reading: to be filled in place."""
    columns = table.state_to_fill() if reading else table.state()
    return {
        name: Shard((num_rows, *tensor.shape[1:]), (table.first_row, *(0 for _ in tensor.shape[1:])), tensor)
        for name, tensor in columns.items()
    }
