"""The Open Inference Protocol, version 2: KServe's and Triton's clients ask this server unchanged.

Inputs are the spec's columns as tensors (`tensors`), outputs the tasks. Item columns have one row a candidate; request-level columns
have either one row, which is computed once for all candidates, or as many as the items.

Shape legend: N candidates, T tasks.
"""

import re
import time
from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import ninerank
from ninerank.errors import RequestError, nearest
from ninerank.predictor.admission import Steps
from ninerank.predictor.call import Call
from ninerank.predictor.front import Front, message_of
from ninerank.predictor.grpcport import Service
from ninerank.predictor.host import UnknownModelError
from ninerank.predictor.request import RankInput, StageTimes
from ninerank.predictor.service import RankService
from ninerank.predictor.tensors import LENGTHS, columns_of, datatype_of
from ninerank.proto.inference import open_inference_pb2 as oip

__all__ = ["OpenInference"]

NAME = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_ID = re.compile(r"[!-~]{1,128}")


class OpenInference:
    """The methods of `inference.GRPCInferenceService` around a front."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def service(self) -> Service:
        """The service as a port takes it."""
        return Service(
            NAME,
            {
                "ServerLive": self._live,
                "ServerReady": self._ready,
                "ModelReady": self._model_ready,
                "ServerMetadata": self._server_metadata,
                "ModelMetadata": self._model_metadata,
                "ModelInfer": self._infer,
            },
        )

    async def _live(self, data: bytes, call: Call) -> bytes:
        answer: bytes = oip.ServerLiveResponse(live=True).SerializeToString()
        return answer

    async def _ready(self, data: bytes, call: Call) -> bytes:
        is_ready = any(state.state == "READY" for state in self._front.host.models())
        answer: bytes = oip.ServerReadyResponse(ready=is_ready).SerializeToString()
        return answer

    async def _model_ready(self, data: bytes, call: Call) -> bytes:
        request = message_of(oip.ModelReadyRequest, data)
        try:
            self._front.host.lease(request.name, request.version, call.request_id)
        except UnknownModelError:
            return oip.ModelReadyResponse(ready=False).SerializeToString()
        return oip.ModelReadyResponse(ready=True).SerializeToString()

    async def _server_metadata(self, data: bytes, call: Call) -> bytes:
        answer: bytes = oip.ServerMetadataResponse(name="ninerank", version=ninerank.__version__).SerializeToString()
        return answer

    async def _model_metadata(self, data: bytes, call: Call) -> bytes:
        request = message_of(oip.ModelMetadataRequest, data)
        with self._front.host.lease(request.name, request.version, call.request_id) as service:
            manifest, tensor = service.engine.manifest, oip.ModelMetadataResponse.TensorMetadata
            inputs = []
            for name, dtype in _types(service).items():
                datatype, shape = datatype_of(dtype)
                inputs.append(tensor(name=name, datatype=datatype, shape=shape))
                if len(shape) == 2:
                    inputs.append(tensor(name=name + LENGTHS, datatype="INT64", shape=[-1]))
            outputs = [tensor(name=task, datatype="FP32", shape=[-1]) for task in manifest.tasks]
            answer: bytes = oip.ModelMetadataResponse(
                name=manifest.model_name, versions=[manifest.model_version], platform="ninerank", inputs=inputs, outputs=outputs
            ).SerializeToString()
            return answer

    async def _infer(self, data: bytes, call: Call) -> bytes:
        self._front.check_size(data)
        request = message_of(oip.ModelInferRequest, data)
        if _ID.fullmatch(request.id):
            call.request_id = request.id
        call.limit(min(request.parameters["timeout"].int64_param // 1000, 1 << 31) if "timeout" in request.parameters else 0)
        rows = max((tensor.shape[0] for tensor in request.inputs if tensor.shape), default=0)
        self._front.check_rows(rows)
        return await self._front.dispatcher.run(call, rows, self._steps(request, rows, call))

    def _steps(self, request: oip.ModelInferRequest, rows: int, call: Call) -> Steps:
        started_ns = time.perf_counter_ns()
        call.check_deadline()
        with self._front.host.lease(request.model_name, request.model_version, call.request_id) as service:
            columns = columns_of(request, _types(service))
            decoded_ns = time.perf_counter_ns()
            scores_NT, defaulted = yield from _scores(service, columns, rows)
            answer = _response(request, service, scores_NT)
            times = StageTimes(0, 0, (time.perf_counter_ns() - decoded_ns) // 1000)
            service.observe(call, rows, defaulted, service.times_us(call, started_ns, decoded_ns, decoded_ns, times))
            return answer


def _types(service: RankService) -> dict[str, pa.DataType]:
    schema = service.engine.schema
    return {field.name: field.type for side in (schema.request, schema.item) for field in side}


def _scores(
    service: RankService, columns: dict[str, pa.Array], rows: int
) -> Generator[None, Any, tuple[npt.NDArray[np.float32], tuple[str, ...]]]:
    """scores_NT, and the columns that nobody sent."""
    schema = service.engine.schema
    request_names, item_names = set(schema.request.names), set(schema.item.names)
    wide = any(len(array) != 1 for name, array in columns.items() if name in request_names)
    count = rows if wide else 1
    zeros = pa.array(np.zeros(rows, np.int64))
    repeated = {name: array.take(zeros) if wide and len(array) == 1 else array for name, array in columns.items() if name in request_names}
    user, user_missing = schema.conform("request", repeated, count)
    items, item_missing = schema.conform("item", {name: array for name, array in columns.items() if name in item_names}, rows)
    if wide:
        named = dict(zip(user.schema.names, user.columns, strict=True)) | dict(zip(items.schema.names, items.columns, strict=True))
        scores_NT = yield from service.score_rows(pa.RecordBatch.from_pydict(named))
    else:
        scores_NT = (yield from service.rank_parts(RankInput(user, items), 0)).scores_NT
    return scores_NT, (*user_missing, *item_missing)


def _response(request: oip.ModelInferRequest, service: RankService, scores_NT: npt.NDArray[np.float32]) -> bytes:
    manifest = service.engine.manifest
    response = oip.ModelInferResponse(model_name=manifest.model_name, model_version=manifest.model_version, id=request.id)
    for name in [output.name for output in request.outputs] or manifest.tasks:
        if name not in manifest.tasks:
            raise RequestError(f"unknown output {name[:100]!r}; {nearest(name[:100], manifest.tasks)}")
        scores_N = np.ascontiguousarray(scores_NT[:, manifest.tasks.index(name)])
        output = response.outputs.add(name=name, datatype="FP32", shape=[len(scores_N)])
        if request.raw_input_contents:
            response.raw_output_contents.append(scores_N.astype("<f4").tobytes())
        else:
            output.contents.fp32_contents.extend(scores_N.tolist())
    answer: bytes = response.SerializeToString()
    return answer
