"""Which server holds which keys: asked of sentinels and of nodes of a cluster, beside the requests."""

import contextlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from ninerank.predictor.cache.connection import StoreError, Wire
from ninerank.predictor.cache.endpoint import RedisEndpoint

__all__ = ["Address", "locate"]

Address: TypeAlias = tuple[str, int]
ASK_S = 0.25


def locate(endpoint: RedisEndpoint, known: Sequence[Address], slots: Sequence[int]) -> list[Address] | None:
    """Address of the server of each of `slots`; None where nobody answers.

    known: nodes of a cluster that were found before, asked after those that the endpoint names.
    """
    if endpoint.kind == "standalone":
        return [endpoint.hosts[0]] * len(slots)
    for host, port in dict.fromkeys([*endpoint.hosts, *(known if endpoint.kind == "cluster" else ())]):
        with contextlib.suppress(StoreError, TimeoutError):
            # Sentinels have passwords of their own, or none; the one of the endpoint is the servers'.
            wire = Wire(endpoint, host, port, ASK_S, plain=endpoint.kind == "sentinel")
            try:
                found = _master(wire, endpoint.service, len(slots)) if endpoint.kind == "sentinel" else _owners(wire, host, slots)
            finally:
                wire.close()
            if found is not None:
                return found
    return None


def _master(wire: Wire, service: str, count: int) -> list[Address] | None:
    reply = wire.call(b"SENTINEL", b"get-master-addr-by-name", service, timeout_s=ASK_S)
    if not isinstance(reply, list) or len(reply) != 2:
        return None
    return [(reply[0].decode(), int(reply[1]))] * count


def _owners(wire: Wire, asked_host: str, slots: Sequence[int]) -> list[Address] | None:
    reply: Any = wire.call(b"CLUSTER", b"SLOTS", timeout_s=ASK_S)
    ranges = [(int(first), int(last), master[0], int(master[1])) for first, last, master, *_ in reply]
    owners: list[Address] = []
    for slot in slots:
        owner = next(((host, port) for first, last, host, port in ranges if first <= slot <= last), None)
        if owner is None:
            return None  # a slot that nobody serves: the cluster is being changed
        # A node that does not know its own address means the one under which it was asked.
        owners.append((owner[0].decode() if owner[0] else asked_host, owner[1]))
    return owners
