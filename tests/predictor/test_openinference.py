"""The Open Inference Protocol: by its own messages, and by Triton's client in a process of its own."""

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from ninerank.predictor.client import PredictorClient
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.proto.inference import open_inference_pb2 as oip

USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS: dict[str, Any] = {
    "item_id": ["i1", "i2", "i3"],
    "price": [1.5, 2.5, 0.5],
    "tags": [["t1"], [], ["t2", "t3"]],
    "city": ["é", "b", ""],
}
# With tritonclient 2.73 and its service_pb2, which this process must not load: it bears the same names.
CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("small")
assert not client.is_model_ready("another")
metadata = client.get_model_metadata("small")
assert [tensor.name for tensor in metadata.outputs] == ["click"]
inputs = []
for name, (datatype, values) in json.loads(sys.argv[2]).items():
    array = np.array(values, dtype=object if datatype == "BYTES" else {"INT64": np.int64, "FP64": np.float64}[datatype])
    inputs.append(triton.InferInput(name, list(array.shape), datatype))
    inputs[-1].set_data_from_numpy(array)
result = client.infer("small", inputs, outputs=[triton.InferRequestedOutput("click")], request_id="r-1")
assert result.get_response().id == "r-1"
print(json.dumps(result.as_numpy("click").tolist()))
try:
    client.infer("small", inputs[:1] + inputs[:1])
except triton.InferenceServerException as error:
    assert error.status() == "StatusCode.INVALID_ARGUMENT", error.status()
else:
    raise SystemExit("an input that is sent twice was taken")
"""
TENSORS: dict[str, tuple[str, Any]] = {
    "user_id": ("BYTES", ["u1"]),
    "age": ("FP64", [30.5]),
    "hour": ("INT64", [7]),
    "history": ("BYTES", [["i1", "i2"]]),
    "item_id": ("BYTES", ITEMS["item_id"]),
    "price": ("FP64", ITEMS["price"]),
    "tags": ("BYTES", [["t1", ""], ["", ""], ["t2", "t3"]]),
    "tags.lengths": ("INT64", [1, 0, 2]),
    "city": ("BYTES", ITEMS["city"]),
}


@pytest.fixture(scope="module")
def served(bundle_dir: Path) -> Iterator[str]:
    own = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", max_candidates=500))
    yield f"127.0.0.1:{own.start().port}"
    own.stop(0)


def ranked(target: str) -> Any:
    with PredictorClient(target) as client:
        return client.rank(USER, ITEMS).scores


def call(target: str, method: str, request: Any, answer: Any) -> Any:
    with grpc.insecure_channel(target) as channel:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return answer.FromString(channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(data, timeout=60))


def infer_request(tensors: dict[str, tuple[str, Any]], *, is_raw: bool = True) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="small", id="r-2")
    fields = {"BYTES": "bytes_contents", "INT64": "int64_contents", "FP64": "fp64_contents"}
    for name, (datatype, values) in tensors.items():
        shape = np.array(values, object).shape
        flat = np.array(values, object).reshape(-1).tolist()
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        flat = [element.encode() for element in flat] if datatype == "BYTES" else flat
        if not is_raw:
            getattr(tensor.contents, fields[datatype]).extend(flat)
        elif datatype == "BYTES":
            request.raw_input_contents.append(b"".join(struct.pack("<I", len(element)) + element for element in flat))
        else:
            request.raw_input_contents.append(np.array(flat, {"INT64": "<i8", "FP64": "<f8"}[datatype]).tobytes())
    return request


def test_triton_s_client_gets_the_scores_of_a_rank_call(served: str) -> None:
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient python-rapidjson")
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, served, json.dumps(TENSORS)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.array(json.loads(done.stdout), np.float32), ranked(served))


@pytest.mark.parametrize("is_raw", [True, False])
def test_tensors_get_the_scores_of_a_rank_call(served: str, is_raw: bool) -> None:
    answer = call(served, "ModelInfer", infer_request(TENSORS, is_raw=is_raw), oip.ModelInferResponse)
    assert (answer.model_name, answer.model_version, answer.id) == ("small", "7", "r-2")
    (output,) = answer.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("click", "FP32", [3])
    scores = np.frombuffer(answer.raw_output_contents[0], "<f4") if is_raw else np.array(output.contents.fp32_contents, np.float32)
    assert np.array_equal(scores, ranked(served))


def test_users_may_come_row_by_row(served: str) -> None:
    wide = {name: (kind, values * 3 if len(values) == 1 else values) for name, (kind, values) in TENSORS.items()}
    answer = call(served, "ModelInfer", infer_request(wide), oip.ModelInferResponse)
    assert np.abs(np.frombuffer(answer.raw_output_contents[0], "<f4") - ranked(served)).max() <= 1e-6
    mixed = {**wide, "age": TENSORS["age"]}
    again = call(served, "ModelInfer", infer_request(mixed), oip.ModelInferResponse)
    assert again.raw_output_contents == answer.raw_output_contents


def test_metadata_names_columns_and_tasks(served: str) -> None:
    assert call(served, "ServerLive", oip.ServerLiveRequest(), oip.ServerLiveResponse).live
    assert call(served, "ServerReady", oip.ServerReadyRequest(), oip.ServerReadyResponse).ready
    assert call(served, "ModelReady", oip.ModelReadyRequest(name="small", version="7"), oip.ModelReadyResponse).ready
    assert not call(served, "ModelReady", oip.ModelReadyRequest(name="small", version="8"), oip.ModelReadyResponse).ready
    assert call(served, "ServerMetadata", oip.ServerMetadataRequest(), oip.ServerMetadataResponse).name == "ninerank"
    metadata = call(served, "ModelMetadata", oip.ModelMetadataRequest(name="small"), oip.ModelMetadataResponse)
    inputs = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs}
    assert inputs.keys() >= TENSORS.keys()
    assert all(inputs[name][0] == datatype for name, (datatype, _) in TENSORS.items())
    assert inputs["tags"] == ("BYTES", [-1, -1])
    assert [(tensor.name, tensor.datatype) for tensor in metadata.outputs] == [("click", "FP32")]


def changed(**tensors: tuple[str, Any]) -> oip.ModelInferRequest:
    return infer_request({**TENSORS, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}})


def spoilt(name: str, data: bytes) -> oip.ModelInferRequest:
    request = infer_request(TENSORS)
    request.raw_input_contents[list(TENSORS).index(name)] = data
    return request


WRONG = {
    "no message": (b"\xff", "is no inference.ModelInferRequest"),
    "nothing": (oip.ModelInferRequest(), "1 to 500 rows, this one has 0"),
    "unknown input": (changed(prise=("FP64", [1.0])), "unknown input 'prise'; did you mean 'price'"),
    "ragged": (changed(price=("FP64", [1.0, 2.0])), "'price' has 2 rows, 3 are needed"),
    "a matrix for a column": (changed(price=("FP64", [[1.0, 2.0]] * 3)), "shape [3, 2], [rows] is needed"),
    "a column for lists": (changed(tags=("BYTES", ["a", "b", "c"])), "[rows, values] is needed"),
    "lengths beyond the width": (changed(tags__lengths=("INT64", [1, 0, 3])), "holds 0 to 3, 0 to 2 are allowed"),
    "negative lengths": (changed(tags__lengths=("INT64", [1, -1, 2])), "holds -1 to 2"),
    "too few lengths": (changed(tags__lengths=("INT64", [1])), "needs 3 whole numbers"),
    "not a number": (changed(price=("FP64", [1.0, float("nan"), 2.0])), "'price', row 1: nan"),
    "too few bytes": (spoilt("price", b"123"), "'price' has 3 bytes, 3 values of FP64 are needed"),
    "lengths past the end": (spoilt("city", struct.pack("<I", 2**32 - 1) + b"x"), "that each follow their length"),
    "text that is none": (spoilt("user_id", struct.pack("<I", 1) + b"\xff"), "is not UTF-8"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tensors_are_refused(served: str, what: str) -> None:
    request, text = WRONG[what]
    with pytest.raises(grpc.RpcError) as refusal:
        call(served, "ModelInfer", request, oip.ModelInferResponse)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in refusal.value.details()


def test_absurd_shapes_and_other_datatypes(served: str) -> None:
    for shape in ([2**62, 2**62], [-1], [], [10**9]):
        request = infer_request(TENSORS)
        del request.inputs[5].shape[:]
        request.inputs[5].shape.extend(shape)
        with pytest.raises(grpc.RpcError) as refusal:
            call(served, "ModelInfer", request, oip.ModelInferResponse)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    request = infer_request(TENSORS)
    request.inputs[5].datatype = "FP32"
    request.raw_input_contents[5] = np.array(ITEMS["price"], "<f4").tobytes()
    answer = call(served, "ModelInfer", request, oip.ModelInferResponse)
    assert np.array_equal(np.frombuffer(answer.raw_output_contents[0], "<f4"), ranked(served))
    for name, wanted in (("FP8", "unknown"), ("", "has datatype ''")):
        request.inputs[5].datatype = name
        with pytest.raises(grpc.RpcError) as refusal:
            call(served, "ModelInfer", request, oip.ModelInferResponse)
        assert "has datatype" in refusal.value.details(), wanted
