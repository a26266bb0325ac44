"""The seam between the calls that come in and the models that answer them.

A call asks the `ModelHost` for a lease of a model version, computes through it and gives it back:

    with host.lease("ctr", "") as service:
        answer = service.rank(request, call)

Whoever swaps versions takes the old one out of the host, waits until nobody leases it (`Served.drained`), and only then lets go of
its memory: no call ever sees half a model, and none fails since a version went away under it. Leases are short: a call that waits
in the queue holds none.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from ninerank.errors import NinerankError, RequestError
from ninerank.predictor.manifest import Manifest
from ninerank.predictor.service import RankService

__all__ = ["ModelHost", "ModelState", "NoAdminError", "Served", "SingleModel", "UnknownModelError"]

LOADING, READY, DRAINING, FAILED = "LOADING", "READY", "DRAINING", "FAILED"


class UnknownModelError(RequestError):
    """A call names a model or version that is not served; gRPC NOT_FOUND."""


class NoAdminError(NinerankError):
    """This server's models are fixed; gRPC FAILED_PRECONDITION."""


@dataclass(frozen=True)
class ModelState:
    """One version, as ModelStatus tells it. state: LOADING, READY, DRAINING or FAILED. leases: calls that compute with it now.

    loaded_at_s: Unix time, 0 before it is loaded. reason: of a version that FAILED. sequence: deltas applied to its rows.
    """

    name: str
    version: str
    state: str
    spec_digest: str = ""
    tasks: tuple[str, ...] = ()
    loaded_at_s: float = 0.0
    leases: int = 0
    reason: str = ""
    sequence: int = 0


class Served:
    """One loaded model version and how many calls compute with it; a context manager that counts its caller in and out.

    stamp: of what it was loaded from. sequence: deltas that were applied to its rows.
    """

    def __init__(self, service: RankService, stamp: str = "", sequence: int = 0) -> None:
        self.service, self.stamp, self.sequence = service, stamp, sequence
        self.loaded_at_s = time.time()
        self._leases = 0
        self._is_leaving = False
        self._idle = threading.Condition()

    @property
    def manifest(self) -> Manifest:
        return self.service.engine.manifest

    def __enter__(self) -> RankService:
        with self._idle:
            self._leases += 1
        return self.service

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._idle:
            self._leases -= 1
            if not self._leases:
                self._idle.notify_all()

    def drained(self, timeout_s: float) -> bool:
        """Wait until no call holds a lease, at most `timeout_s`; whoever calls has seen to it that no new call gets one."""
        with self._idle:
            self._is_leaving = True
            return self._idle.wait_for(lambda: not self._leases, timeout_s)

    def state(self) -> ModelState:
        """What ModelStatus tells of it."""
        manifest = self.manifest
        return ModelState(
            manifest.model_name,
            manifest.model_version,
            DRAINING if self._is_leaving else READY,
            manifest.spec_digest,
            tuple(manifest.tasks),
            self.loaded_at_s,
            self._leases,
            sequence=self.sequence,
        )


class ModelHost(Protocol):
    """Model versions that are served; every method may be called from any thread at any time."""

    def lease(self, name: str, version: str, key: str = "") -> Served:
        """The version that answers a call, to be entered (`with`) at once and left when the call is computed.

        name, version: empty for what the host's policy says. key: what a percentage policy splits traffic by (session, tenant or
        request id), so that one user keeps one arm. Raises UnknownModelError, naming what is served. Runs in the way of every
        request: a look into a dictionary, no file, no wait.
        """

    def shadow(self, name: str, key: str) -> "Served | None":
        """The version that is to score a call too, unheard; None for most calls. Runs in the way of every request."""

    def models(self) -> Sequence[ModelState]:
        """Every version that is loading, ready, draining or refused."""

    def load(self, name: str, version: str) -> ModelState:
        """Load a version, or the newest (`""`), check, warm and serve it. Raises BundleError, UnknownModelError or NoAdminError."""

    def unload(self, name: str, version: str) -> ModelState:
        """Take a version out of service and drain it. Raises UnknownModelError or NoAdminError."""

    def close(self) -> None:
        """Let go of every model; nobody leases any more."""


class SingleModel:
    """The ModelHost of one bundle, for as long as the server runs."""

    def __init__(self, service: RankService, retire: Callable[[RankService], None] = lambda _: None) -> None:
        """retire: lets go of the service at the end."""
        self._served, self._retire = Served(service), retire
        self._name, self._version = self._served.manifest.model_name, self._served.manifest.model_version

    def lease(self, name: str, version: str, key: str = "") -> Served:
        """See ModelHost."""
        if name and name != self._name:
            raise UnknownModelError(f"model {name[:100]!r} is not served here; served: {self._name}")
        if version and version != self._version:
            raise UnknownModelError(f"version {version[:100]!r} is not served here; served: {self._version}")
        return self._served

    def shadow(self, name: str, key: str) -> Served | None:
        """See ModelHost."""
        return None

    def models(self) -> Sequence[ModelState]:
        """See ModelHost."""
        return (self._served.state(),)

    def load(self, name: str, version: str) -> ModelState:
        """See ModelHost."""
        raise NoAdminError("this server serves one bundle for as long as it runs: models are loaded by a server of a model directory")

    def unload(self, name: str, version: str) -> ModelState:
        """See ModelHost."""
        raise NoAdminError("this server serves one bundle for as long as it runs: stop it to take the model out of service")

    def close(self) -> None:
        """See ModelHost."""
        self._retire(self._served.service)
