"""What a server says of itself once it answers."""

from dataclasses import dataclass

__all__ = ["Announcement"]


@dataclass(frozen=True)
class Announcement:
    """port: of gRPC. metrics_port, admin_port: None without these. cache_entities, cache_key: None without a feature cache."""

    model_name: str
    model_version: str
    device: str
    host: str
    port: int
    metrics_port: int | None = None
    admin_port: int | None = None
    cache_entities: int | None = None
    cache_key: str | None = None
