"""The feature caches of a server, as its configuration says: from files, or before a Redis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ninerank.config import Config
from ninerank.errors import DataError, nearest
from ninerank.features.spec import FeatureSpec
from ninerank.predictor.cache.changes import ChangeFollower
from ninerank.predictor.cache.endpoint import MEMORY, parse_endpoint
from ninerank.predictor.cache.entities import default_item_key, default_user_key, entity_columns, entity_schema
from ninerank.predictor.cache.entityfile import load_items
from ninerank.predictor.cache.lookup import CachePolicy, FeatureCache
from ninerank.predictor.cache.redisstore import RedisStore

__all__ = ["FeatureCaches", "FeatureSettings", "open_caches"]

DEFAULT_USER_CACHE_BYTES = 256 << 20
CALLED = {"item": "candidate ids", "user": "user id"}


class FeatureSettings(Config):
    """Where features by id come from, and how much of them is kept.

    url: `memory:`, or a Redis (`endpoint`). items, users: Parquet files, of `memory:` alone. item_key, user_key: column of the ids, by
    default what `entities` finds. cache_bytes: of items. user_cache_bytes: of users. policy: of what comes from a Redis.
    """

    url: str = MEMORY
    items: Path | None = None
    users: Path | None = None
    item_key: str | None = None
    user_key: str | None = None
    cache_bytes: int = Field(default=1 << 30, ge=1 << 20)
    user_cache_bytes: int = Field(default=DEFAULT_USER_CACHE_BYTES, ge=1 << 20)
    policy: CachePolicy = CachePolicy()


@dataclass(frozen=True)
class FeatureCaches:
    """Caches by kind of entity, `item` and `user`, and the stores behind them."""

    of: Mapping[str, FeatureCache]
    stores: Mapping[str, RedisStore]
    followers: Sequence[ChangeFollower] = ()

    @property
    def items(self) -> FeatureCache | None:
        return self.of.get("item")

    @property
    def users(self) -> FeatureCache | None:
        return self.of.get("user")

    @property
    def shared(self) -> dict[str, str]:
        """What another process of this machine passes to `open_caches` to use the same memory, while this one lives."""
        return {kind: cache.path for kind, cache in self.of.items()}

    def told(self) -> list[str]:
        """A line a cache, for people."""
        lines = []
        for kind, cache in self.of.items():
            store = self.stores.get(kind)
            what = f"{cache.stats().entities:,} {kind}s" if store is None else f"{kind}s of {store.endpoint.shown} ({store.state()})"
            lines.append(f"{what} by {cache.key}")
        return lines

    def close(self) -> None:
        """Let go of memory and connections."""
        for follower in self.followers:
            follower.close()
        for store in self.stores.values():
            store.close()
        for cache in self.of.values():
            cache.close()


def open_caches(spec: FeatureSpec, settings: FeatureSettings, shared: Mapping[str, str] | None = None) -> FeatureCaches:
    """The caches of a spec's items and users; none of `memory:` without files, and none of a kind that has no id column.

    shared: memory of another process by kind (`FeatureCaches.shared`), which filled it where there are files. Raises DataError where a
    key cannot be told or is no column, and for files that cannot be read; SpecError for a URL that is none.
    """
    endpoint = parse_endpoint(settings.url)
    if endpoint is not None and (settings.items or settings.users):
        raise DataError(f"{settings.items or settings.users}: features come from {endpoint.shown}; `ninerank cache load` puts a file there")
    caches, stores = dict[str, FeatureCache](), dict[str, RedisStore]()
    parts = (
        ("item", settings.items, settings.item_key, settings.cache_bytes),
        ("user", settings.users, settings.user_key, settings.user_cache_bytes),
    )
    for kind, path, named, capacity_bytes in parts:
        columns = entity_columns(spec, kind)
        key = named or (default_item_key(spec) if kind == "item" else default_user_key(spec))
        # Candidate ids travel by themselves; a user's id is a column of the request.
        is_sent = endpoint is not None and kind == "item"
        if path is None and named is not None and named not in columns.names and not is_sent:
            raise DataError(f"{kind} key {named!r} is no {kind} column; {nearest(named, columns.names)}")
        if path is not None:
            if key is None:
                raise DataError(f"{path}: which column holds the ids? name it (--{kind}-key), one of the file's columns")
            path_of = (shared or {}).get(kind)
            caches[kind] = load_items(path, columns, key=key, capacity_bytes=capacity_bytes, shared=path_of, called=CALLED[kind])
        elif endpoint is not None and key is not None and set(columns.names) - {key}:
            stores[kind] = RedisStore(endpoint, kind)
            caches[kind] = FeatureCache(
                entity_schema(spec, kind, key),
                key=key,
                capacity_bytes=capacity_bytes,
                store=stores[kind],
                policy=settings.policy,
                shared=(shared or {}).get(kind),
                called=CALLED[kind],
            )
    for cache in caches.values():
        cache.warm()
    followers = [ChangeFollower(caches[kind], store.endpoint, kind) for kind, store in stores.items()]
    return FeatureCaches(caches, stores, followers)
