"""Declaration of a tiered table."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ninerank.config import Config

__all__ = ["TierConfig"]


class TierConfig(Config):
    """Where a table lies and how many of its rows the device holds.

    placement: `host` keeps the table in RAM, `disk` in a memory-mapped file under `directory`. cache_rows: rows on the device; a batch may
    hold at most as many distinct ids. prefetch: read the rows of the next batch, once it is announced, on a thread beside the training;
    write-backs run there, too. decay: factor on all frequencies after each training step; 1 is plain LFU, less forgets what was popular
    long ago (half of it after ln 2 / (1 - decay) steps). keep: leave the file on disk when the table is closed (`kept_columns` reads it).

    >>> TierConfig(cache_rows=1000).placement
    'host'
    """

    placement: Literal["host", "disk"] = "host"
    cache_rows: int = Field(ge=1, lt=1 << 31)
    directory: str | None = None
    prefetch: bool = True
    decay: float = Field(default=0.999, gt=0.0, le=1.0)
    keep: bool = False

    @model_validator(mode="after")
    def _disk_has_a_directory(self) -> Self:
        if self.placement == "disk" and not self.directory:
            raise ValueError("placement 'disk' needs a directory")
        if self.placement == "host" and (self.directory is not None or self.keep):
            raise ValueError("directory and keep belong to placement 'disk'; this one is 'host'")
        return self

    def of_process(self, rank: int, world_size: int) -> Self:
        """For one of several processes that share the table out: a directory of its own, nothing read ahead.

        >>> TierConfig(cache_rows=9, placement="disk", directory="/fast").of_process(1, 2).directory
        '/fast/process-1-of-2'
        """
        directory = self.directory and str(Path(self.directory) / f"process-{rank}-of-{world_size}")
        return self.model_copy(update={"directory": directory, "prefetch": False})
