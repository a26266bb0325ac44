"""Figures of a tiered table, ready to be logged."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

__all__ = ["TierStatistics"]


@dataclass(frozen=True)
class TierStatistics:
    """Size and traffic of one table; counters run since it was made.

    num_rows: of the table. cache_rows: slots on the device. size: slots in use. hits, misses: distinct rows of each batch that the device
    held, or did not. prefetched: misses that had been read ahead. evictions: rows that gave up their slot; those that had changed were
    written back. bytes_read, bytes_written: between backing store and device, read-ahead that was not used included.
    """

    num_rows: int
    cache_rows: int
    size: int
    hits: int
    misses: int
    prefetched: int
    evictions: int
    bytes_read: int
    bytes_written: int

    @classmethod
    def together(cls, parts: Sequence["TierStatistics"]) -> "TierStatistics":
        """Of a table whose rows several processes hold, each with a cache of its own: all is added up."""
        return cls(*(sum(getattr(part, field.name) for part in parts) for field in fields(cls)))

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); nan before the first batch."""
        rows = self.hits + self.misses
        return self.hits / rows if rows else float("nan")

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Name -> value, as `<prefix>.<figure>`."""
        return {f"{prefix}.{name}": float(value) for name, value in (*asdict(self).items(), ("hit_rate", self.hit_rate))}
