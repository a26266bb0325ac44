"""How tables are laid over processes: what a recipe may say about it."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ninerank.config import Config

__all__ = ["ShardingConfig", "ShardingKind"]

ShardingKind = Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ShardingConfig(Config):
    """Placement of static tables in training by several processes.

    default, tables: kind for all tables, and for those named: `table_wise` (a table in one process), `row_wise` (rows in W blocks),
    `column_wise` (columns in W equal blocks; a group of dim 1 stays table-wise), `data_parallel` (a copy in each process),
    or `auto`: the planner chooses by predicted time and memory. pooling: mean ids a row by feature, as the planner assumes
    them (1 for one id a row, else `max_length` of the spec, or 10). memory_bytes: what the tables of one process may take; by default
    80 % of its device's memory, or of its share of the host's. quantised_comms: type in which embeddings and their gradients travel.
    kernel: compute kernel of lookups and updates of static tables, by the name it has in `ninerank.fusion.kernels`, or `fbgemm` for
    FBGEMM's table-batched embeddings; `auto`: one of ours. timeout_s: a collective call that takes longer ends the run with an error.
    """

    default: ShardingKind = "auto"
    tables: dict[str, ShardingKind] = Field(default_factory=dict)
    pooling: dict[str, Positive] = Field(default_factory=dict)
    memory_bytes: PositiveInt | None = None
    quantised_comms: Literal["none", "fp16", "bf16"] = "none"
    kernel: Literal["auto", "numba", "triton", "torch", "fbgemm"] = "auto"
    timeout_s: Positive = 1800.0

    def kind_of(self, table: str) -> ShardingKind:
        """Kind asked for a table."""
        return self.tables.get(table, self.default)
