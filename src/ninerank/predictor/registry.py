"""Many models and versions, which come and go while calls are answered.

A thread looks at the store every `poll_s`. A version that the policy wants is loaded beside those that answer, its checksums and golden
scores are verified, it is warmed, and then the routes of its model are replaced by new ones in one assignment: a call sees the old routes
or the new. The version that nobody routes to any more drains, and is let go of. One that cannot be loaded is refused with its reason, and
tried again only when it is written anew; whoever answered goes on. Deltas of a version's rows (`livedelta`) are swapped in the same way.

    store --look--> wanted versions --load, verify, warm--> routes --lease--> calls
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pydantic import Field

from ninerank.config import Config
from ninerank.errors import BundleError, NinerankError, SpecError
from ninerank.predictor.host import DRAINING, FAILED, LOADING, ModelState, Served, UnknownModelError
from ninerank.predictor.livedelta import LiveRows
from ninerank.predictor.modelstore import ModelStore, version_order
from ninerank.predictor.policy import Canary, Latest, Pinned, Policy, Shadow, in_share, read_policy
from ninerank.predictor.service import RankService

__all__ = ["ModelRegistry", "RegistryConfig", "ServiceMaker"]

log = logging.getLogger(__name__)

# A thread that loads a model holds the interpreter for so long at a time, and calls wait: a tenth of Python's own 5 ms.
LOADING_SWITCH_S = 0.0005


class RegistryConfig(Config):
    """poll_s: between looks at the store. drain_s: how long a version that is taken out may still compute. keep: older versions that stay
    loaded beside those that are wanted, for calls that name them and for going back at once.
    """

    poll_s: float = Field(default=1.0, gt=0, le=3600)
    drain_s: float = Field(default=30.0, ge=0, le=3600)
    keep: int = Field(default=0, ge=0, le=16)


class ServiceMaker(Protocol):
    """Makes and unmakes what answers for one bundle."""

    def make(self, bundle_dir: Path) -> RankService:
        """Load, verify and warm a bundle. Raises NinerankError."""

    def retire(self, service: RankService) -> None:
        """Let go of what `make` opened: nobody computes with it, or with a service that was renewed from it, any more."""


@dataclass(frozen=True)
class _Routes:
    """Who answers for one model, replaced as a whole."""

    versions: Mapping[str, Served]
    default: str
    trial: str | None = None
    percent: float = 0.0
    is_shadow: bool = False


@dataclass
class _Model:
    """What the thread that looks at the store knows of one model."""

    policy: Policy = field(default_factory=Latest)
    command: Policy | None = None
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)  # version -> stamp, reason
    out: dict[str, str] = field(default_factory=dict)  # taken out of service by command: version -> stamp
    loading: str | None = None
    draining: list[Served] = field(default_factory=list)
    was_told: str = ""
    rows: dict[str, tuple[str, LiveRows]] = field(default_factory=dict)  # version -> stamp, rows with deltas
    deltas_told: dict[str, str] = field(default_factory=dict)


class ModelRegistry:
    """The ModelHost of a store; see the module. `start` loads what is there, and from then on changes are followed.

    on_change: told of every version that began to answer or was refused, for tests and logs.
    """

    def __init__(
        self,
        store: ModelStore,
        maker: ServiceMaker,
        config: RegistryConfig | None = None,
        on_change: Callable[[ModelState], None] | None = None,
    ) -> None:
        self.config = config or RegistryConfig()
        self._store, self._maker = store, maker
        self._on_change = on_change or (lambda _: None)
        self._routes: dict[str, _Routes] = {}
        self._models: dict[str, _Model] = {}
        self._changing = threading.RLock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="registry", daemon=True)

    def start(self) -> None:
        """Load what the store has; raises BundleError where no model at all can be served."""
        self.look()
        if not self._routes:
            reasons = [f"{name} {version}: {reason}" for name, own in self._models.items() for version, (_, reason) in own.failed.items()]
            raise BundleError("no model can be served" + (f": {'; '.join(reasons)}" if reasons else ": the store holds no bundle"))
        self._thread.start()

    def lease(self, name: str, version: str, key: str = "") -> Served:
        """See ModelHost."""
        routes = self._routes_of(name)
        if version:
            served = routes.versions.get(version)
            if served is None:
                known = ", ".join(routes.versions)
                raise UnknownModelError(f"version {version[:100]!r} is not served here; served: {known}")
            return served
        chosen = routes.default
        if routes.trial is not None and not routes.is_shadow and in_share(key, routes.percent, routes.trial):
            chosen = routes.trial
        return routes.versions[chosen]

    def shadow(self, name: str, key: str) -> Served | None:
        """The version that scores a call too, unheard; None for most."""
        try:
            routes = self._routes_of(name)
        except UnknownModelError:
            return None
        if routes.trial is None or not routes.is_shadow or not in_share(key, routes.percent, routes.trial):
            return None
        return routes.versions[routes.trial]

    def models(self) -> Sequence[ModelState]:
        """See ModelHost."""
        states = []
        # Without the lock: a call that asks must not wait until a model is loaded. Copies are taken of what the other thread changes.
        for name, own in list(self._models.items()):
            routes, loading = self._routes.get(name), own.loading
            states += [served.state() for served in (routes.versions.values() if routes else ())]
            states += [replace(served.state(), state=DRAINING) for served in list(own.draining)]
            states += [] if loading is None else [ModelState(name, loading, LOADING)]
            states += [ModelState(name, version, FAILED, reason=reason) for version, (_, reason) in list(own.failed.items())]
        return states

    def load(self, name: str, version: str) -> ModelState:
        """Serve this version of a model, also an older one: it stays until it is told otherwise. `version` "": the policy's file again."""
        name = name or self._only_name()
        with self._changing:
            own = self._models.setdefault(name, _Model())
            found = self._store.versions(name)
            if not found:
                raise UnknownModelError(f"model {name[:100]!r} is not in the store; there are: {', '.join(self._store.models()) or 'none'}")
            if version and version not in found:
                raise UnknownModelError(f"version {version[:100]!r} of {name} is not in the store; there are: {', '.join(found)}")
            own.failed.pop(version, None)
            own.out.pop(version, None)
            before, own.command = own.command, Pinned(version=version) if version else None
            self._look_at(name, own)
            wanted = version or self._routes[name].default
            if wanted in own.failed:
                own.command = before
                raise BundleError(own.failed[wanted][1])
            return self._routes[name].versions[wanted].state()

    def unload(self, name: str, version: str) -> ModelState:
        """Take a version out of service and drain it; the policy chooses another one, and does not take it again."""
        with self._changing:
            name = name or self._only_name()
            routes = self._routes_of(name)
            version = version or routes.default
            served = routes.versions.get(version)
            if served is None:
                raise UnknownModelError(f"version {version[:100]!r} is not served here; served: {', '.join(routes.versions)}")
            own = self._models[name]
            own.out[version] = self._store.versions(name).get(version, "")
            if isinstance(own.command, Pinned) and own.command.version == version:
                own.command = None
            self._look_at(name, own)
            return replace(served.state(), state=DRAINING)

    def close(self) -> None:
        """See ModelHost."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._changing:
            routes, self._routes = self._routes, {}
            for own in routes.values():
                for served in own.versions.values():
                    self._let_go(served)

    def look(self) -> None:
        """Look at the store once, now; what it finds wrong is logged and kept as the state of a version."""
        with self._changing:
            try:
                names = self._store.models()
            except (NinerankError, OSError) as error:
                log.warning("the store of models cannot be read: %s", error)
                return
            for name in sorted({*names, *self._routes}):
                try:
                    self._look_at(name, self._models.setdefault(name, _Model()))
                except (NinerankError, OSError) as error:
                    log.warning("model %s: %s", name, error)

    def _follow(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self.config.poll_s)
            self._wake.clear()
            if not self._closed.is_set():
                self.look()

    def _routes_of(self, name: str) -> _Routes:
        routes = self._routes
        if name:
            if name not in routes:
                raise UnknownModelError(f"model {name[:100]!r} is not served here; served: {', '.join(routes) or 'none'}")
            return routes[name]
        if len(routes) != 1:
            raise UnknownModelError(f"several models are served, the call names none; served: {', '.join(routes) or 'none'}")
        return next(iter(routes.values()))

    def _only_name(self) -> str:
        names = self._store.models()
        if len(names) != 1:
            raise UnknownModelError(f"the store has the models {', '.join(names) or 'none'}; name one")
        return names[0]

    def _look_at(self, name: str, own: _Model) -> None:
        """Bring one model's routes to what store and policy say."""
        found = self._store.versions(name)
        self._read_policy(name, own)
        own.failed = {version: (stamp, why) for version, (stamp, why) in own.failed.items() if found.get(version, "") == stamp}
        own.out = {version: stamp for version, stamp in own.out.items() if found.get(version, "") == stamp}
        found = {version: stamp for version, stamp in found.items() if version not in own.out}
        routes = self._routes.get(name)
        held = {version: served for version, served in routes.versions.items() if version not in own.out} if routes is not None else {}
        for version, stamp in found.items():
            if version in held and held[version].stamp != stamp:
                del held[version]  # written anew: what was loaded is another one
        policy = own.command or own.policy
        order = sorted(found, key=version_order, reverse=True)
        trial = policy.version if isinstance(policy, Canary | Shadow) else None
        stable = policy.version if isinstance(policy, Pinned) else getattr(policy, "stable", None)
        if trial is not None and trial in found:
            self._have(name, own, trial, found[trial], held)
        default = self._first_of([stable] if stable is not None else [v for v in order if v != trial], name, own, found, held)
        if default is None:
            # Nothing that is wanted loads: whoever answers goes on answering, even if it is gone from the store.
            if routes is None:
                return
            if routes.default in own.out:
                self._replace_routes(name, routes, None)
                return
            default = routes.default
            held.setdefault(default, routes.versions[default])
        if trial is not None and trial not in held:
            trial = None
        wanted = {version for version in (default, trial) if version is not None}
        others = sorted((v for v in held if v not in wanted), key=version_order, reverse=True)[: self.config.keep]
        versions = {
            version: self._with_deltas(name, version, held[version], own) for version in sorted({*wanted, *others}, key=version_order)
        }
        percent = policy.percent if isinstance(policy, Canary | Shadow) and trial is not None else 0.0
        new = _Routes(versions, default, trial, percent, isinstance(policy, Shadow))
        if new != routes:
            self._replace_routes(name, routes, new)

    def _first_of(self, wanted: Sequence[str], name: str, own: _Model, found: Mapping[str, str], held: dict[str, Served]) -> str | None:
        """The first of these versions that is loaded or can be."""
        for version in wanted:
            if version in held or (version in found and self._have(name, own, version, found[version], held)):
                return version
        return None

    def _have(self, name: str, own: _Model, version: str, stamp: str, held: dict[str, Served]) -> bool:
        """Load a version into `held` if it is not there and was not refused before; whether it is there."""
        if version in held:
            return True
        if version in own.failed:
            return False
        own.loading = version
        started, switch_s = time.perf_counter(), sys.getswitchinterval()
        sys.setswitchinterval(min(switch_s, LOADING_SWITCH_S))
        try:
            service = self._maker.make(self._store.fetch(name, version))
            manifest = service.engine.manifest
            if (manifest.model_name, manifest.model_version) != (name, version):
                self._maker.retire(service)
                raise BundleError(f"{name}/{version}: holds {manifest.model_name} {manifest.model_version}; name the directory after it")
            held[version] = Served(service, stamp)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a version, the others go on
            reason = str(error) if isinstance(error, NinerankError) else f"{type(error).__name__}: {error}"
            own.failed[version] = (stamp, reason)
            log.error("%s %s is refused, what is served goes on: %s", name, version, reason)
            self._on_change(ModelState(name, version, FAILED, reason=reason))
            return False
        finally:
            own.loading = None
            sys.setswitchinterval(switch_s)
        log.info("%s %s is loaded after %.2f s", name, version, time.perf_counter() - started)
        return True

    def _with_deltas(self, name: str, version: str, served: Served, own: _Model) -> Served:
        """The version with every delta that is there; the one that is served where the next does not follow."""
        directory = self._store.deltas(name, version)
        if directory is None:
            return served
        try:
            rows = own.rows.get(version)
            if rows is None or rows[0] != served.stamp:
                rows = (served.stamp, LiveRows.begin(served.service.engine.bundle, directory))
            live = rows[1]
            while live.has_next(directory):
                live = live.follow(directory)
            own.rows[version] = (served.stamp, live)
            if live.position.sequence == served.sequence:
                return served
            renewed = Served(served.service.renewed(served.service.engine.renewed(live.bundle)), served.stamp, live.position.sequence)
        except (NinerankError, OSError) as error:
            if own.deltas_told.get(version) != str(error):
                own.deltas_told[version] = str(error)
                log.error("%s %s: a delta is not applied, its rows stay at %d: %s", name, version, served.sequence, error)
            return served
        log.info("%s %s has the rows of delta %d", name, version, renewed.sequence)
        return renewed

    def _replace_routes(self, name: str, old: _Routes | None, new: _Routes | None) -> None:
        """Swap the routes of a model, then drain what they no longer name."""
        routes = {other: own for other, own in self._routes.items() if other != name}
        if new is not None:
            routes[name] = new
        self._routes = routes  # one assignment: a call sees the old routes or the new
        kept = {} if new is None else new.versions
        own = self._models[name]
        before = {} if old is None else old.versions
        for version, served in kept.items():
            if before.get(version) is not served:
                self._on_change(served.state())
        for version, served in before.items():
            if version not in kept:
                own.rows.pop(version, None)
            if kept.get(version) is not served:
                own.draining.append(served)
                # With more deltas the same version goes on, and what its services share stays open.
                is_last = version not in kept or kept[version].stamp != served.stamp
                threading.Thread(target=self._drain, args=(own, served, is_last), name=f"drain-{name}-{version}", daemon=True).start()

    def _drain(self, own: _Model, served: Served, is_last: bool) -> None:
        self._let_go(served, is_last=is_last)
        with self._changing:
            own.draining.remove(served)

    def _let_go(self, served: Served, *, is_last: bool = True) -> None:
        manifest = served.manifest
        if not served.drained(self.config.drain_s):
            log.warning("%s %s still computes after %g s", manifest.model_name, manifest.model_version, self.config.drain_s)
        if is_last:
            self._maker.retire(served.service)
            log.info("%s %s is let go of", manifest.model_name, manifest.model_version)

    def _read_policy(self, name: str, own: _Model) -> None:
        path = self._store.policy(name)
        try:
            own.policy = Latest() if path is None else read_policy(path)
            own.was_told = ""
        except SpecError as error:
            if str(error) != own.was_told:
                log.error("the policy of %s is not taken, the one before goes on: %s", name, error)
                own.was_told = str(error)
