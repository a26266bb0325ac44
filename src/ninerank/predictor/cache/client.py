"""redis-py clients for work beside requests: loading, following streams, looking things up. Here waiting and trying again is right."""

from typing import Any

from ninerank.errors import DataError
from ninerank.predictor.cache.endpoint import RedisEndpoint

__all__ = ["connect", "failing"]

TIMEOUT_S = 10.0


def connect(endpoint: RedisEndpoint, *, timeout_s: float = TIMEOUT_S) -> Any:
    """A client of the server, the sentinels' master or the cluster; raises DataError where nobody answers."""
    from redis.exceptions import RedisError

    try:
        client = _client(endpoint, timeout_s)
        client.ping()
    except (RedisError, OSError) as error:
        raise failing(endpoint, error) from None
    return client


def failing(endpoint: RedisEndpoint, error: Exception) -> DataError:
    """What to say of a Redis that fails."""
    return DataError(f"{endpoint.shown}: {' '.join(str(error).split()) or type(error).__name__}")


def _client(endpoint: RedisEndpoint, timeout_s: float) -> Any:
    import redis

    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "password": endpoint.password or None}
    if endpoint.username:
        options["username"] = endpoint.username
    if endpoint.tls:
        options |= {"ssl": True, **({"ssl_ca_certs": endpoint.tls_ca} if endpoint.tls_ca else {})}
    if endpoint.kind == "cluster":
        node: Any = redis.cluster.ClusterNode
        return redis.RedisCluster(startup_nodes=[node(host, port) for host, port in endpoint.hosts], **options)
    if endpoint.kind == "sentinel":
        plain = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        sentinel: Any = redis.Sentinel
        return sentinel(list(endpoint.hosts), sentinel_kwargs=plain, **options).master_for(endpoint.service, db=endpoint.db)
    host, port = endpoint.hosts[0]
    if not port:
        options.pop("socket_connect_timeout")
        return redis.Redis(unix_socket_path=host, db=endpoint.db, **options)
    return redis.Redis(host=host, port=port, db=endpoint.db, **options)
