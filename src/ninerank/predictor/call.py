"""What is known of one call while it runs, whatever way it came in."""

import secrets
import time
from dataclasses import dataclass

from ninerank.errors import DeadlineError

__all__ = ["HIGH", "LOW", "NORMAL", "Call", "new_request_id"]

HIGH, NORMAL, LOW = range(3)
"""Priorities: a waiting call of a smaller number goes first."""


@dataclass
class Call:
    """arrived_ns: perf_counter. deadline_ns: perf_counter, None without a deadline. priority: HIGH, NORMAL or LOW.

    client: name of who calls where the server knows it, for quotas and logs; never a secret.
    """

    arrived_ns: int
    deadline_ns: int | None = None
    request_id: str = ""
    priority: int = NORMAL
    client: str = ""

    def limit(self, timeout_ms: int) -> None:
        """Take a deadline that the message itself brings, if it is sooner than the call's; 0: none."""
        if timeout_ms:
            deadline_ns = self.arrived_ns + timeout_ms * 1_000_000
            self.deadline_ns = deadline_ns if self.deadline_ns is None else min(deadline_ns, self.deadline_ns)

    def check_deadline(self) -> None:
        """Raise DeadlineError if an answer would come too late."""
        if self.deadline_ns is not None:
            late_ns = time.perf_counter_ns() - self.deadline_ns
            if late_ns >= 0:
                raise DeadlineError(f"the deadline passed {late_ns / 1e6:.1f} ms ago, before the request was computed")


def new_request_id() -> str:
    """A request id for a client that sent none."""
    return secrets.token_hex(8)
