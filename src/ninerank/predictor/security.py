"""Who may call: bearer tokens from files, quotas by client; knows nothing of gRPC.

A token file has one client a line: `name token [requests_per_s]`; `#` begins a comment. It is read again when it changes, and a file
that cannot be read any more, or is wrong, leaves the tokens that were in force. Tokens are kept as digests, compared in constant
time, and appear in no message and no log.
"""

import hashlib
import hmac
import logging
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator
from typing_extensions import Self

from ninerank.config import Config
from ninerank.errors import NinerankError, OverloadError, SpecError

__all__ = ["Client", "Guard", "SecurityConfig", "TokenFile", "UnauthenticatedError"]

log = logging.getLogger(__name__)

CHECK_S = 1.0
MIN_TOKEN_LENGTH = 16
BEARER = "bearer "


class UnauthenticatedError(NinerankError):
    """A call brings no token, or one that nobody has; gRPC UNAUTHENTICATED."""


class SecurityConfig(Config):
    """Who may call and over what. Nothing set: anybody, in the clear, which is for a machine or a network that nobody else is on.

    certificate, key: PEM files of the server (TLS). client_ca: PEM file of whoever signs clients' certificates; without one of these
    no client is let in (mTLS). tokens, admin_tokens: token files of callers and of admins; neither opens the other's port.
    requests_per_s: quota of each client whose line names none, which needs tokens or client_ca. Files are read again when they change.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    tokens: Path | None = None
    admin_tokens: Path | None = None
    requests_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate and key: clients' certificates come with TLS")
        if self.requests_per_s is not None and self.tokens is None and self.client_ca is None:
            raise ValueError("requests_per_s needs tokens or client_ca: a quota is of a client that the server knows")
        return self


@dataclass(frozen=True)
class Client:
    """A line of a token file."""

    name: str
    requests_per_s: float | None


class TokenFile:
    """The tokens of a file, followed as it changes; raises SpecError for a file that is wrong at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clients, self._stamp = _read(path), _stamp(path)
        self._checked_s = time.monotonic()
        self._lock = threading.Lock()

    def client(self, token: str) -> Client | None:
        """Whose token it is; None for nobody's."""
        self._follow()
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, client in self._clients:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = client
        return found

    def _follow(self) -> None:
        now_s = time.monotonic()
        if now_s - self._checked_s < CHECK_S or not self._lock.acquire(blocking=False):
            return
        try:
            self._checked_s = now_s
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._clients = _read(self._path)
            log.info("%s: %d clients' tokens are in force", self._path, len(self._clients))
        except SpecError as error:
            log.error("%s; the tokens from before stay in force", error)
        finally:
            self._lock.release()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _read(path: Path) -> tuple[tuple[bytes, Client], ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as a token file ({type(error).__name__})") from None
    clients: dict[bytes, Client] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if not 2 <= len(words) <= 3:
            raise SpecError(f"{path}:{number}: has {len(words)} words; `name token [requests_per_s]` is needed")
        if len(words[1]) < MIN_TOKEN_LENGTH:
            raise SpecError(
                f"{path}:{number}: the token of {words[0]!r} has {len(words[1])} characters, at least {MIN_TOKEN_LENGTH} are needed"
            )
        digest = hashlib.sha256(words[1].encode()).digest()
        if digest in clients:
            raise SpecError(f"{path}:{number}: the token of {words[0]!r} is that of {clients[digest].name!r} too")
        clients[digest] = Client(words[0], _rate(words[2], f"{path}:{number}") if len(words) == 3 else None)
    if not clients:
        raise SpecError(f"{path}: holds no token")
    return tuple(clients.items())


def _rate(word: str, place: str) -> float:
    try:
        rate = float(word)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise SpecError(f"{place}: requests_per_s is {word!r}, a number above 0 is needed")
    return rate


class Guard:
    """Lets callers in by their tokens, and each only so often.

    tokens: None: anybody may call, and clients are known by their certificates alone. requests_per_s: quota of a client whose line
    names none; None: no quota.
    """

    def __init__(self, tokens: TokenFile | None, requests_per_s: float | None) -> None:
        self._tokens = tokens
        self._requests_per_s = requests_per_s
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def enter(self, authorization: str | None, certificate_name: str = "") -> str:
        """Name of the client that calls, whose quota it takes from ("": nobody that the server knows).

        authorization: the header of that name. Raises UnauthenticatedError, and OverloadError where the quota is used up.
        """
        rate, name = self._requests_per_s, certificate_name
        if self._tokens is not None:
            client = self.know(authorization)
            assert client is not None
            name = client.name
            rate = client.requests_per_s or rate
        if name and rate is not None:
            self._spend(name, rate)
        return name

    def know(self, authorization: str | None) -> Client | None:
        """Whose token it is, None where no tokens are asked for; raises UnauthenticatedError for nobody's."""
        if self._tokens is None:
            return None
        if authorization is None or not authorization[: len(BEARER)].lower() == BEARER:
            raise UnauthenticatedError("this server answers callers with a token alone: send `authorization: Bearer TOKEN`")
        client = self._tokens.client(authorization[len(BEARER) :].strip())
        if client is None:
            raise UnauthenticatedError("the token is not known here")
        return client

    def _spend(self, name: str, rate: float) -> None:
        """A bucket of one second's requests (at least one), which fills at `rate`."""
        now_s, size = time.monotonic(), max(rate, 1.0)
        with self._lock:
            left, since_s = self._buckets.get(name, (size, now_s))
            left = min(left + (now_s - since_s) * rate, size)
            is_over = left < 1.0
            self._buckets[name] = (left if is_over else left - 1.0, now_s)
        if is_over:
            wait_ms = max(math.ceil((1.0 - left) / rate * 1000), 1)
            raise OverloadError(f"client {name!r} has used up its {rate:g} requests a second; try again in {wait_ms} ms", wait_ms)
