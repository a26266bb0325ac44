"""What one column becomes, and what fitting learned about it: encodings of ids and transforms of numbers.

Row 0 of every table stands for missing, unknown and default; known ids are 1, 2, ...; hashed ids are 1 + hash mod num_buckets,
numbered ones 1 + id.
A dynamic id stays an id of 64 bits: its table gives it a row, or row 0.
"""

from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr, model_validator
from typing_extensions import Self

from ninerank.config import Config

__all__ = [
    "INT64_MAX",
    "INT64_MIN",
    "MISSING_ID",
    "Bucketize",
    "Dynamic",
    "Hashed",
    "Log",
    "Numbered",
    "Raw",
    "Standardise",
    "Vocabulary",
]

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
MAX_TABLE_ROWS = (1 << 31) - 2
MISSING_ID = INT64_MIN


class Vocabulary(Config):
    """One row for each known id; ids outside `values` take row 0.

    Fitting keeps ids seen at least `min_count` times, the `max_size` most frequent of them (ties by value), most frequent first.
    """

    kind: Literal["vocabulary"] = "vocabulary"
    min_count: int = Field(default=1, ge=1)
    max_size: int | None = Field(default=None, ge=1, le=MAX_TABLE_ROWS)
    values: tuple[StrictInt, ...] | tuple[StrictStr, ...] | None = Field(default=None, description="fitted: the id of row 1, 2, ...")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.values is not None:
            if len(set(self.values)) != len(self.values):
                raise ValueError("values holds an id twice; each id has one row")
            if "" in self.values:
                raise ValueError("values holds an empty string, which means missing (row 0)")
        return self


class Hashed(Config):
    """Row 1 + XXH64(id, seed) mod num_buckets: needs no fitting, takes ids never seen, lets ids collide."""

    kind: Literal["hashed"] = "hashed"
    num_buckets: int = Field(ge=1, le=MAX_TABLE_ROWS)
    seed: int = Field(default=0, ge=0, le=INT64_MAX)


class Numbered(Config):
    """Row 1 + id of ids that are numbered 0 ... num_ids - 1 already: nothing to fit, no list to keep.

    out_of_range: what becomes of any other id. `error` refuses the row it is in, `clamp` takes the nearest id, `default` the row of a
    missing id: that of the feature's `default`, or row 0.
    """

    kind: Literal["numbered"] = "numbered"
    num_ids: int = Field(ge=1, le=MAX_TABLE_ROWS)
    out_of_range: Literal["error", "clamp", "default"] = "error"


class Dynamic(Config):
    """The id itself, 64 bits wide, for a table whose rows come and go: nothing to fit, no two int64 ids ever share a row.

    An int64 id stays as it is, a string becomes its XXH64 with `seed` (read as int64). -2^63 (`MISSING_ID`) stands for missing in a
    batch: an int64 id of this value is read as missing, and a string never has it (-2^63 + 1 takes its place).
    """

    kind: Literal["dynamic"] = "dynamic"
    seed: int = Field(default=0, ge=0, le=INT64_MAX, description="of the hash of strings")


class Raw(Config):
    """y = x."""

    kind: Literal["raw"] = "raw"


class Log(Config):
    """y = sign(x) log(1 + |x|)."""

    kind: Literal["log"] = "log"


class Standardise(Config):
    """y = (x - mean) / std; both are fitted (std of a constant column is 1)."""

    kind: Literal["standardise"] = "standardise"
    mean: float | None = Field(default=None, allow_inf_nan=False, description="fitted")
    std: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="fitted")

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        return self


class Bucketize(Config):
    """Row 1 + (number of boundaries <= x): the number becomes an id with its own table.

    `boundaries` are given, or fitted as quantiles that cut the sample into at most `num_buckets` parts.
    """

    kind: Literal["bucketize"] = "bucketize"
    num_buckets: int = Field(default=10, ge=2, le=1_000_000)
    boundaries: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = Field(default=None, description="given or fitted")

    @model_validator(mode="after")
    def _increasing(self) -> Self:
        if self.boundaries is not None and any(b <= a for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError("boundaries must increase strictly")
        return self
