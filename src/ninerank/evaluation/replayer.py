"""Who scores a logged request again: the bundle's own engine, or a live endpoint.

Shape legend: N candidates of a request, T tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ninerank.errors import DataError, NinerankError

if TYPE_CHECKING:
    from ninerank.predictor.engine import Engine
    from ninerank.predictor.request import RankInput, RequestSchema
    from ninerank.predictor.requestlog import LoggedRequest

__all__ = ["Answer", "BundleReplayer", "EndpointReplayer", "Replayer"]


@dataclass(frozen=True)
class Answer:
    """New scores of one request, and who gave them."""

    scores_NT: npt.NDArray[np.float32]
    model_name: str
    model_version: str


class Replayer(ABC):
    """Scores logged requests again. tasks: names of the model's outputs; schema: columns it reads; None where not known beforehand."""

    source: str
    kind: Literal["bundle", "endpoint"]
    spec_digest: str | None = None
    device: str | None = None
    tasks: tuple[str, ...] | None = None
    schema: "RequestSchema | None" = None

    @abstractmethod
    def rank(self, request: "LoggedRequest") -> Answer:
        """Score the request's candidates, in their order. Raises NinerankError that names the request."""

    def score(self, request: "LoggedRequest", features: "RankInput") -> npt.NDArray[np.float32]:
        """scores_NT of the request with other features."""
        return self.rank(replace(request, input=features)).scores_NT

    def close(self) -> None:  # noqa: B027 - only an endpoint holds anything
        """Let go of connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class BundleReplayer(Replayer):
    """The bundle's engine in this process; refuses requests that were served with another spec."""

    kind = "bundle"

    def __init__(self, engine: "Engine", source: str) -> None:
        self.source = source
        self.spec_digest, self.tasks, self.device = engine.manifest.spec_digest, tuple(engine.manifest.tasks), engine.device.name
        self.schema = engine.schema
        self._engine = engine

    @classmethod
    def load(cls, bundle_dir: str | Path, device: str = "auto", *, precision: Literal["fp32", "bf16"] = "fp32") -> "BundleReplayer":
        """Replayer of the bundle in `bundle_dir`; raises BundleError or DeviceError."""
        from ninerank.predictor.engine import Engine

        return cls(Engine.load(bundle_dir, device, precision=precision), str(bundle_dir))

    def rank(self, request: "LoggedRequest") -> Answer:
        if request.spec_digest != self.spec_digest:
            raise DataError(
                f"request {request.request_id!r} was served by {request.model_name} {request.model_version} with spec digest "
                f"{request.spec_digest}, bundle {self.source} has spec digest {self.spec_digest}; a bundle of the same spec is needed"
            )
        with _naming(request):
            scores_NT = self._engine.rank(request.input).scores_NT
        return Answer(scores_NT, self._engine.manifest.model_name, self._engine.manifest.model_version)


class EndpointReplayer(Replayer):
    """A live server: features are sent as they were logged, so that its cache has no say."""

    kind = "endpoint"

    def __init__(self, target: str, timeout_ms: int = 5000) -> None:
        from ninerank.predictor.client import PredictorClient

        self.source = target
        self._client = PredictorClient(target, timeout_ms=timeout_ms)

    def rank(self, request: "LoggedRequest") -> Answer:
        user, items = request.input.user, request.input.items
        with _naming(request):
            result = self._client.rank(
                {name: user.column(name)[0].as_py() for name in user.schema.names},
                {name: items.column(name) for name in items.schema.names},
                ids=None if items.num_columns else np.arange(items.num_rows),
                request_id=request.request_id,
            )
        scores_NT = np.stack(list(result.tasks.values()), axis=1) if result.tasks else result.scores[:, None]
        return Answer(scores_NT, result.model_name, result.model_version)

    def close(self) -> None:
        self._client.close()


@contextmanager
def _naming(request: "LoggedRequest") -> Iterator[None]:
    try:
        yield
    except NinerankError as error:
        raise type(error)(f"request {request.request_id!r}: {error}") from None
