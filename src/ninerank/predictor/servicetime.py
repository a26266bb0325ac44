"""How long a request of so many rows takes to compute, by what was measured lately."""

__all__ = ["ServiceTime"]

DECAY = 0.95
STALE_NS = 1_000_000_000


class ServiceTime:
    """A line through (rows, time) by least squares, in which every new observation takes 5 % of the weight.

    An estimate that no observation of the last second holds up counts for nothing, and the next observation begins anew: after one
    slow spell a server that drops what cannot make it would otherwise never compute, and never learn that it became fast again.

    >>> service = ServiceTime()
    >>> for rows in (100, 200, 300):
    ...     service.observe(rows, 1_000 + 10 * rows, now_ns=0)
    >>> service.expected_ns(400, now_ns=0), service.expected_ns(400, now_ns=2 * STALE_NS)
    (5000, 0)
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._ns = self._variance = self._covariance = 0.0
        self._seen_ns = 0

    def observe(self, rows: int, elapsed_ns: int, now_ns: int) -> None:
        """A request of `rows` rows took `elapsed_ns`."""
        if now_ns - self._seen_ns > STALE_NS:
            self._weight = self._rows = self._ns = self._variance = self._covariance = 0.0
        self._seen_ns = now_ns
        self._weight = self._weight * DECAY + 1.0
        share = 1.0 / self._weight
        off_rows, off_ns = rows - self._rows, elapsed_ns - self._ns
        self._rows += share * off_rows
        self._ns += share * off_ns
        self._variance += share * (off_rows * (rows - self._rows) - self._variance)
        self._covariance += share * (off_rows * (elapsed_ns - self._ns) - self._covariance)

    def expected_ns(self, rows: int, now_ns: int) -> int:
        """Nanoseconds that a request of `rows` rows takes; 0 where nothing is known of late."""
        if not self._weight or now_ns - self._seen_ns > STALE_NS:
            return 0
        slope = max(self._covariance / self._variance, 0.0) if self._variance > 1.0 else 0.0
        return max(round(self._ns + slope * (rows - self._rows)), 0)
