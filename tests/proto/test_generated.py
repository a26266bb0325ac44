"""The generated code says what the .proto files say, and imports under `ninerank` alone."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from ninerank.proto.v1 import predictor_pb2

ROOT = Path(predictor_pb2.__file__).resolve().parent.parent
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generate_proto.py"


def test_descriptor_is_that_of_the_proto_file(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    out = tmp_path / "set.binpb"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"--descriptor_set_out={out}", "ninerank/v1/predictor.proto"]
    subprocess.run(command, check=True)
    (source,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    generated = descriptor_pb2.FileDescriptorProto.FromString(predictor_pb2.DESCRIPTOR.serialized_pb)
    for message in source.message_type:
        for field in message.field:
            field.ClearField("json_name")
    assert source == generated


def test_files_are_what_the_script_writes() -> None:
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("generate_proto", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    files = module.generate()
    assert {path.name for path in files} == {
        *("predictor_pb2.py", "predictor_pb2.pyi", "predictor_pb2_grpc.py"),
        *("open_inference_pb2.py", "open_inference_pb2.pyi"),
    }
    for path, text in files.items():
        assert _less_tool_version(path.read_text()) == _less_tool_version(text), f"{path} is stale: run python scripts/generate_proto.py"


def _less_tool_version(text: str) -> str:
    """The text without what differs between releases of grpcio-tools that generate the same code."""
    text = re.sub(r"GRPC_GENERATED_VERSION = '.*'|# Protobuf Python Version: .*", "", text)
    text = re.sub(r"(_runtime_version.Domain.PUBLIC),\s+\d+,\s+\d+,\s+\d+,", r"\1,", text)
    return text.replace("(object):", ":").replace(": _Optional[bool] = ", ": bool = ")


def test_field_numbers_never_change() -> None:
    """The numbers that peers in the field rely on; adding to this table is fine, changing a line is not."""
    known = {
        "RankRequest": {
            "request_id": 1, "model_name": 2, "model_version": 3, "user": 4, "num_candidates": 5, "candidate_ids": 6,
            "item_features": 7, "top_k": 8, "timeout_ms": 9, "tasks": 10, "explain_top": 11, "priority": 12, "session": 13,
        },
        "Column": {
            "name": 1, "int64_values": 2, "float32_values": 3, "float64_values": 4, "string_values": 5, "list_offsets": 6,
            "validity": 7,
        },
        "Strings": {"data": 1, "offsets": 2},
        "RankResponse": {
            "request_id": 1, "model_name": 2, "model_version": 3, "scores": 4, "order": 5, "tasks": 6, "timings": 7, "defaults": 8,
            "staleness": 12,
            "explanations": 10,
        },
        "Explanations": {"features": 1, "candidates": 2, "contributions": 3, "baselines": 4},
        "RankStreamResponse": {"response": 1, "error": 2},
        "Error": {"request_id": 1, "code": 2, "message": 3, "retry_after_ms": 4},
        "ScoreRequest": {
            "request_id": 1, "model_name": 2, "model_version": 3, "num_rows": 4, "features": 5, "timeout_ms": 6, "tasks": 7, "priority": 8,
        },
        "ScoreResponse": {
            "request_id": 1, "model_name": 2, "model_version": 3, "tasks": 4, "timings": 5, "defaults": 6,
        },
        "ModelStatusRequest": {"model_name": 1, "model_version": 2},
        "ModelStatusResponse": {"models": 1},
        "ModelVersion": {
            "name": 1, "version": 2, "state": 3, "spec_digest": 4, "tasks": 5, "loaded_at_s": 6, "leases": 7, "reason": 8,
        },
        "LoadModelRequest": {"model_name": 1, "model_version": 2},
        "LoadModelResponse": {"model": 1},
        "UnloadModelRequest": {"model_name": 1, "model_version": 2},
        "UnloadModelResponse": {"model": 1},
        "TaskScores": {"name": 1, "scores": 2},
        "Timings": {
            "queue_us": 1, "decode_us": 2, "cache_us": 3, "transform_us": 4, "lookup_us": 5, "compute_us": 6, "total_us": 7,
        },
        "Defaults": {
            "user_columns": 1, "item_columns": 2, "unknown_candidates": 3, "unknown_user": 4, "failed_candidates": 5, "failed_user": 6,
        },
    }  # fmt: skip
    messages = predictor_pb2.DESCRIPTOR.message_types_by_name
    for name, fields in known.items():
        assert {field.name: field.number for field in messages[name].fields}.items() >= fields.items()


def test_unknown_fields_of_a_newer_client_are_kept_and_ignored() -> None:
    newer = predictor_pb2.RankRequest(num_candidates=3).SerializeToString() + b"\xca\x3e\x03abc"  # field 1001, length-delimited
    assert predictor_pb2.RankRequest.FromString(newer).num_candidates == 3
