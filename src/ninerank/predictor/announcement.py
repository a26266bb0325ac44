"""What a server says of itself once it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Announcement"]


@dataclass(frozen=True)
class Announcement:
    """port: of gRPC. metrics_port, admin_port, http_port: None without these.

    caches: a line each. shared: their memory by kind, for others.
    """

    model_name: str
    model_version: str
    device: str
    host: str
    port: int
    metrics_port: int | None = None
    admin_port: int | None = None
    http_port: int | None = None
    caches: Sequence[str] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
