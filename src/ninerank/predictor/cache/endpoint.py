"""Where features are kept, as a person writes it: `memory:`, or the URL of a Redis.

    memory:                                              in the server's own memory, filled from a file
    redis://[user:password@]host[:port][/db]             one server; rediss:// over TLS
    redis-sentinel://host[:port],host[:port]/service[/db]     the master that the sentinels name
    redis-cluster://host[:port],host[:port]              a cluster, found through any of its nodes
    unix:///path/of/socket[?db=0]

Settings follow as ?name=value&...: prefix, timeout_ms, connect_timeout_ms, tags, tls, tls_ca, db.
"""

from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import Field

from ninerank.config import Config
from ninerank.errors import SpecError, nearest

__all__ = ["MEMORY", "Endpoint", "RedisEndpoint", "parse_endpoint"]

MEMORY = "memory:"
Kind = Literal["standalone", "sentinel", "cluster"]
SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("standalone", False),
    "rediss": ("standalone", True),
    "unix": ("standalone", False),
    "redis-sentinel": ("sentinel", False),
    "rediss-sentinel": ("sentinel", True),
    "redis-cluster": ("cluster", False),
    "rediss-cluster": ("cluster", True),
}
PORT, SENTINEL_PORT = 6379, 26379
SETTINGS = ("prefix", "timeout_ms", "connect_timeout_ms", "tags", "tls_ca", "db")


class RedisEndpoint(Config):
    """A Redis and how long it may take. hosts: of servers, sentinels or nodes; of a socket its path and port 0.

    prefix: of every key: `prefix:item:ID`. timeout_ms: what a request waits for an answer. connect_timeout_ms: for a connection.
    tags: of a cluster, the parts into which keys are laid, so that one round trip a node is a few MGETs and not a GET a key.
    """

    kind: Kind = "standalone"
    hosts: tuple[tuple[str, int], ...] = Field(min_length=1)
    service: str = ""
    db: int = Field(default=0, ge=0)
    username: str = ""
    password: str = Field(default="", repr=False)
    tls: bool = False
    tls_ca: str = ""
    prefix: str = Field(default="ninerank", pattern=r"^[!-z|~]{1,64}$")
    timeout_ms: float = Field(default=5.0, gt=0, le=60_000)
    connect_timeout_ms: float = Field(default=20.0, gt=0, le=60_000)
    tags: int = Field(default=64, ge=1, le=1024)

    @property
    def shown(self) -> str:
        """For people and logs: without password."""
        return f"{self.kind} {','.join(f'{host}:{port}' if port else host for host, port in self.hosts)}"


Endpoint = RedisEndpoint | None


def parse_endpoint(url: str) -> Endpoint:
    """The Redis that `url` names; None for `memory:`. Raises SpecError that says what is wrong, without the password.

    >>> parse_endpoint("memory:") is None
    True
    >>> parse_endpoint("redis://cache.example:7000/2?timeout_ms=8").hosts
    (('cache.example', 7000),)
    """
    if url == MEMORY:
        return None
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES or "://" not in url:
        raise SpecError(f"features at {_shown(url)!r}: no such kind of store; {nearest(scheme, ['memory', *SCHEMES])}")
    kind, tls = SCHEMES[scheme]
    try:
        parts = urlsplit(url)
        settings: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise SpecError(f"features at {_shown(url)!r}: {error}") from None
    for name in settings:
        if name not in SETTINGS:
            raise SpecError(f"features at {_shown(url)!r}: unknown setting {name!r}; {nearest(name, SETTINGS)}")
    authority, _, addresses = parts.netloc.rpartition("@")
    username, _, password = authority.partition(":")
    path = [unquote(part) for part in parts.path.split("/")[1:] if part]
    fields = {"kind": kind, "tls": tls, "username": unquote(username), "password": unquote(password), **settings}
    if scheme == "unix":
        return RedisEndpoint.parse({**fields, "hosts": [(unquote(parts.path), 0)]}, "features")
    fields["hosts"] = [_address(text, SENTINEL_PORT if kind == "sentinel" else PORT, url) for text in addresses.split(",")]
    if kind == "sentinel":
        if not path:
            raise SpecError(f"features at {_shown(url)!r}: the service is missing: redis-sentinel://host:port/service")
        fields["service"], path = path[0], path[1:]
    if len(path) > 1 or (path and kind == "cluster"):
        raise SpecError(f"features at {_shown(url)!r}: {parts.path!r} is no database: a number, and of a cluster there is none")
    if path:
        fields["db"] = path[0]
    return RedisEndpoint.parse(fields, "features")


def _address(text: str, default_port: int, url: str) -> tuple[str, int]:
    bracketed = text.startswith("[")
    host, _, port = text.rpartition("]")[2].partition(":") if bracketed else text.partition(":")
    host = text[1 : text.rfind("]")] if bracketed else host
    if not host or (port and not (port.isdecimal() and int(port) <= 65_535)):
        raise SpecError(f"features at {_shown(url)!r}: {text!r} is no address: host or host:port")
    return host, int(port) if port else default_port


def _shown(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"[:200]
