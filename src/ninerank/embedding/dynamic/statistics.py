"""Figures of a dynamic table, ready to be logged."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

__all__ = ["DynamicTableStatistics"]


@dataclass(frozen=True)
class DynamicTableStatistics:
    """Size and traffic of one table; counters run since it was made.

    size: ids with a row. max_rows: capacity, 0 for none. num_slots, load_factor: of the id map. pending: ids counted one by one on
    their way to a row. lookups: ids looked up, in training or not. hits: those with a row when the lookup began. admitted, evicted:
    rows. rejected: occurrences in training that read the default row. num_bytes: memory of map, rows, optimizer state, bookkeeping
    and admission.
    """

    size: int
    max_rows: int
    num_slots: int
    load_factor: float
    pending: int
    lookups: int
    hits: int
    admitted: int
    rejected: int
    evicted: int
    num_bytes: int

    @classmethod
    def together(cls, parts: Sequence["DynamicTableStatistics"]) -> "DynamicTableStatistics":
        """Of a table whose rows several processes hold: what they count is added up; `max_rows` is that of the table."""
        sums = {field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)}
        load_factor = sums["size"] / sums["num_slots"] if sums["num_slots"] else 0.0
        return cls(**{**sums, "load_factor": load_factor, "max_rows": parts[0].max_rows})

    @property
    def hit_rate(self) -> float:
        """hits / lookups; nan before the first lookup."""
        return self.hits / self.lookups if self.lookups else float("nan")

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Name -> value, as `<prefix>.<figure>`."""
        return {f"{prefix}.{name}": float(value) for name, value in (*asdict(self).items(), ("hit_rate", self.hit_rate))}
