"""What answers for one bundle, put together as a server's configuration says: engine, features by id, request log."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ninerank.features.columns import arrow_schema
from ninerank.predictor.cache import FeatureCaches, open_caches
from ninerank.predictor.engine import Engine
from ninerank.predictor.requestlog import RequestLog
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.service import RankService
from ninerank.predictor.telemetry import Telemetry

__all__ = ["Assembly"]

T = TypeVar("T", FeatureCaches, RequestLog)


@dataclass
class _Used(Generic[T]):
    """Something that services share, and how many of them."""

    what: T
    services: int = 0


class Assembly:
    """Makes services, and lets go of what they opened: see `registry.ServiceMaker`. Services of models that read the same columns share
    their caches. Any thread may call it.

    by_version: every version logs to a folder of its own, <log>/<model>/<version>.
    """

    def __init__(self, config: ServeConfig, telemetry: Telemetry, *, by_version: bool = False) -> None:
        self._config, self._telemetry, self._by_version = config, telemetry, by_version
        self._caches: dict[str, _Used[FeatureCaches]] = {}
        self._logs: dict[str, _Used[RequestLog]] = {}
        self._lock = threading.Lock()
        telemetry.hold(self.caches, self.logs)

    def caches(self) -> list[FeatureCaches]:
        """Caches that are open."""
        return [used.what for used in list(self._caches.values())]

    def logs(self) -> list[RequestLog]:
        """Request logs that are open."""
        return [used.what for used in list(self._logs.values())]

    def make(self, bundle_dir: Path) -> RankService:
        """Load a bundle and put its service together. Raises BundleError, DeviceError or DataError."""
        config = self._config
        engine = Engine.load(bundle_dir, config.device, backend=config.backend, precision=config.precision)
        manifest, log = engine.manifest, None
        columns = repr([arrow_schema(engine.spec, "request"), arrow_schema(engine.spec, "item")])
        with self._lock:
            caches = _use(self._caches, columns, lambda: open_caches(engine.spec, config.feature_settings(), config.shared))
            if config.log_dir is not None:
                place = config.log_dir / manifest.model_name / manifest.model_version if self._by_version else config.log_dir
                log = _use(self._logs, str(place), lambda: RequestLog(place, engine.schema, len(manifest.tasks), config.log))

        def release() -> None:
            with self._lock:
                _release(self._caches, columns)
                if log is not None:
                    _release(self._logs, str(log.directory))

        return RankService(
            engine,
            self._telemetry,
            items=caches.items,
            users=caches.users,
            item_key=config.item_key,
            request_log=log,
            release=release,
            merges=engine.device.torch_device.type != "cpu" if config.merge is None else config.merge > 1,
        )

    def retire(self, service: RankService) -> None:
        """Close what no other service uses."""
        service.release()


def _use(held: dict[str, _Used[T]], key: str, make: Callable[[], T]) -> T:
    used = held.get(key)
    if used is None:
        used = held[key] = _Used(make())
    used.services += 1
    return used.what


def _release(held: dict[str, _Used[T]], key: str) -> None:
    used = held[key]
    used.services -= 1
    if not used.services:
        del held[key]
        used.what.close()
