"""How a server listens and what it bounds."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ninerank.config import Config
from ninerank.predictor.cache.endpoint import MEMORY
from ninerank.predictor.cache.lookup import CachePolicy
from ninerank.predictor.cache.opening import DEFAULT_USER_CACHE_BYTES, FeatureSettings
from ninerank.predictor.request import MAX_CANDIDATES
from ninerank.predictor.requestlog import LogConfig
from ninerank.predictor.security import SecurityConfig

__all__ = ["MAX_GRPC_BYTES", "ServeConfig"]

MAX_GRPC_BYTES = (1 << 31) - 1


class ServeConfig(Config):
    """A port of 0 takes a free one.

    reuse_port: several servers of this user may listen on the port, and the kernel shares connections out among them.
    processes: servers on the port, each with an interpreter of its own; as many as there are cores gives the most requests a second.
    workers: threads of a process that compute; 0: its event loop does, which is the fastest where nothing but the processor is
    waited for.
    merge: rank calls that wait may be computed at once, so many of them; default: 1 on the CPU, 16 on devices.
    max_pending: requests taken in at once, those being computed among them; the next one is answered RESOURCE_EXHAUSTED. drain_s: how
    long the end waits for requests under way.
    open_inference: answer `inference.GRPCInferenceService` too.
    http_port: port of the JSON gateway.
    admin_port: port of `ninerank.v1.Admin`; security: who may call either port.
    item_key: column that candidate ids stand for, in the items file too (default: the item id of which the spec has sequences, else
    `item_id` or `item`). user_key: column of the user's id (default: `user_id` or `user`).
    features: where features by id are kept: `memory:`, filled from the files `items` and `users`, or the URL of a Redis.
    shared: memory of another process's caches by kind, which a supervisor fills in.
    poll_s, keep: of a folder or store of models: seconds between looks at it, and older versions that stay loaded. model_copies: where
    versions of an object store are copied to.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    reuse_port: bool = False
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    http_port: int | None = Field(default=None, ge=0, le=65535)
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    security: SecurityConfig = SecurityConfig()
    device: str = "auto"
    backend: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    open_inference: bool = True
    processes: int = Field(default=1, ge=1, le=256)
    workers: int = Field(default=0, ge=0, le=256)
    merge: int | None = Field(default=None, ge=1, le=1024)
    max_pending: int = Field(default=256, ge=1)
    max_message_bytes: int = Field(default=16 << 20, ge=1024, le=MAX_GRPC_BYTES)
    max_candidates: int = Field(default=MAX_CANDIDATES, ge=1)
    features: str = MEMORY
    items: Path | None = None
    item_key: str | None = None
    users: Path | None = None
    user_key: str | None = None
    cache_bytes: int = Field(default=1 << 30, ge=1 << 20)
    user_cache_bytes: int = Field(default=DEFAULT_USER_CACHE_BYTES, ge=1 << 20)
    cache: CachePolicy = CachePolicy()
    shared: dict[str, str] = Field(default_factory=dict)
    poll_s: float = Field(default=1.0, gt=0, le=3600)
    keep: int = Field(default=0, ge=0, le=16)
    model_copies: Path | None = None
    log_dir: Path | None = None
    log: LogConfig = LogConfig()
    drain_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)

    @property
    def has_caches(self) -> bool:
        """Whether there may be feature caches."""
        return self.features != MEMORY or self.items is not None or self.users is not None

    def feature_settings(self) -> FeatureSettings:
        """What `open_caches` takes."""
        return FeatureSettings(
            url=self.features,
            items=self.items,
            users=self.users,
            item_key=self.item_key,
            user_key=self.user_key,
            cache_bytes=self.cache_bytes,
            user_cache_bytes=self.user_cache_bytes,
            policy=self.cache,
        )
