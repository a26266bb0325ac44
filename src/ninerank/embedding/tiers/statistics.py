"""Figures of a tiered table, ready to be logged."""

from dataclasses import asdict, dataclass

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

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); nan before the first batch."""
        rows = self.hits + self.misses
        return self.hits / rows if rows else float("nan")

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Name -> value, as `<prefix>.<figure>`."""
        return {f"{prefix}.{name}": float(value) for name, value in (*asdict(self).items(), ("hit_rate", self.hit_rate))}
