"""Client of a server's admin port: load and unload model versions while it serves."""

from types import TracebackType
from typing import Any

import grpc
from typing_extensions import Self

from ninerank.predictor.client import ClientSecurity, failure, open_channel, token_metadata
from ninerank.proto.v1 import predictor_pb2 as pb
from ninerank.proto.v1.predictor_pb2_grpc import AdminStub

__all__ = ["AdminClient"]

DEFAULT_TIMEOUT_S = 600.0


class AdminClient:
    """A channel to one admin port; close it, or use it as a context manager. timeout_s: loading a large model takes its time."""

    def __init__(self, target: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, security: ClientSecurity | None = None) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._metadata = token_metadata(security)
        self._channel = open_channel(target, (), security)
        self._stub = AdminStub(self._channel)  # type: ignore[no-untyped-call]

    def load(self, name: str = "", version: str = "") -> pb.ModelVersion:
        """Load, check and serve a version ("": the newest). Raises RequestError for one that is not there, NinerankError for a bad one."""
        response: pb.LoadModelResponse = self._call("LoadModel", pb.LoadModelRequest(model_name=name, model_version=version))
        return response.model

    def unload(self, name: str, version: str) -> pb.ModelVersion:
        """Take a version out of service once the calls under way with it are done; errors as of `load`."""
        response: pb.UnloadModelResponse = self._call("UnloadModel", pb.UnloadModelRequest(model_name=name, model_version=version))
        return response.model

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise failure(error, self.target, self._timeout_s) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
