"""Declaration of a dynamic table."""

from typing import Literal

from pydantic import Field

from ninerank.config import Config
from ninerank.embedding.dynamic.admission import AdmissionConfig, Always
from ninerank.embedding.dynamic.eviction import EvictionConfig

__all__ = ["DynamicTableConfig"]


class DynamicTableConfig(Config):
    """How a table of raw ids starts, admits and gives up rows.

    init_std: rows start from N(0, init_std^2). admission, eviction: see these modules; eviction policies act in the order given. clock:
    what `last_seen` and ages count, training steps or seconds. evict_every: steps between checks for age and frequency (0: only when
    asked for); capacity is checked after every step. reserve_rows: rows that address space is reserved for, which costs no memory; a
    table that grows beyond moves its rows, so give the greatest size expected. track_changes: remember which ids were given up, for
    delta export.
    """

    init_std: float = Field(default=0.01, ge=0.0, allow_inf_nan=False)
    admission: AdmissionConfig = Always()
    eviction: tuple[EvictionConfig, ...] = ()
    clock: Literal["steps", "seconds"] = "steps"
    evict_every: int = Field(default=1000, ge=0)
    reserve_rows: int = Field(default=1 << 26, ge=1, le=1 << 40)
    track_changes: bool = False
