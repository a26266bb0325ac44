"""The JSON gateway over real HTTP: the answers and refusals of gRPC."""

import http.client
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from ninerank.errors import DeviceError
from ninerank.predictor.client import PredictorClient
from ninerank.predictor.security import SecurityConfig
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer

USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS = [
    {"item_id": "i1", "price": 1.5, "tags": ["t1"], "city": "rome"},
    {"item_id": "i2", "price": None, "tags": [], "city": "oslo"},
]
TOKEN = "a-token-of-24-characters"


@pytest.fixture(scope="module")
def served(bundle_dir: Path) -> Iterator[tuple[PredictorServer, Any]]:
    own = PredictorServer(bundle_dir, ServeConfig(port=0, http_port=0, device="cpu", max_message_bytes=20_000, max_candidates=500))
    yield own, own.start()
    own.stop(0)


def asked(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text, answer.headers
    finally:
        connection.close()


def test_a_request_gets_the_answer_of_grpc(served: tuple[PredictorServer, Any]) -> None:
    _, ready = served
    with PredictorClient(f"127.0.0.1:{ready.port}") as client:
        wanted = client.rank(USER, ITEMS, top_k=1, explain_top=1)
    body = {"user": USER, "items": ITEMS, "ids": ["a", "b"], "top_k": 1, "request_id": "mine", "explain_top": 1, "priority": "high"}
    status, answer, _ = asked(ready.http_port, "POST", "/v1/rank", body)
    assert status == 200
    assert np.array_equal(np.array(answer["scores"], np.float32), wanted.scores)
    (best,) = answer["ranked"]
    assert (best["index"], best["id"], answer["request_id"]) == (int(wanted.order[0]), "ab"[wanted.order[0]], "mine")
    assert answer["explanations"].keys() == {str(index) for index in wanted.explanations}
    rows = [{**USER, **item} for item in ITEMS]
    status, answer, _ = asked(ready.http_port, "POST", "/v1/score", {"rows": rows, "tasks": ["click"]})
    assert status == 200
    assert np.abs(np.array(answer["scores"]["click"]) - wanted.scores).max() <= 1e-6
    status, answer, _ = asked(ready.http_port, "GET", "/v1/models")
    assert [(model["name"], model["version"], model["state"]) for model in answer["models"]] == [("small", "7", "READY")]
    assert asked(ready.http_port, "GET", "/healthz")[:2] == (200, "ok\n")
    assert asked(ready.http_port, "GET", "/readyz")[:2] == (200, "ready\n")


BAD: dict[str, tuple[Any, int, str, str]] = {
    "no JSON": (b"{", 400, "INVALID_ARGUMENT", "the body: is not valid JSON"),
    "no UTF-8": (b"\xff", 400, "INVALID_ARGUMENT", "the body is not UTF-8"),
    "deep": (b"[" * 9_000, 400, "INVALID_ARGUMENT", "is not valid JSON"),
    "a list": ([], 400, "INVALID_ARGUMENT", "the body"),
    "unknown key": ({"user": USER, "itms": []}, 400, "INVALID_ARGUMENT", "did you mean 'items'"),
    "unknown feature": ({"user": USER, "items": [{"prise": 1.0}]}, 400, "INVALID_ARGUMENT", "did you mean 'price'"),
    "not a number": (b'{"user": {}, "items": {"price": [NaN]}}', 400, "INVALID_ARGUMENT", "'price', row 0: nan"),
    "beyond 64 bits": ({"user": {"hour": 2**80}, "items": ITEMS}, 400, "INVALID_ARGUMENT", "'hour'"),
    "mixed types": ({"user": {}, "items": {"price": [1.0, "x"]}}, 400, "INVALID_ARGUMENT", "'price'"),
    "too many": ({"user": {}, "items": {"price": [1.0] * 501}}, 400, "INVALID_ARGUMENT", "1 to 500 candidates"),
    "unknown model": ({"user": USER, "items": ITEMS, "model": "large"}, 404, "NOT_FOUND", "served: small"),
    "too large": (b" " * 30_000, 429, "RESOURCE_EXHAUSTED", "20,000 bytes that are allowed"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_requests_are_refused_in_json(served: tuple[PredictorServer, Any], what: str) -> None:
    body, code, name, text = BAD[what]
    status, answer, _ = asked(served[1].http_port, "POST", "/v1/rank", body)
    assert (status, answer["error"]["status"]) == (code, name)
    assert text in answer["error"]["message"]
    assert answer["error"]["request_id"]
    assert asked(served[1].http_port, "POST", "/v1/rank", {"user": USER, "items": ITEMS})[0] == 200


def test_other_paths_and_ports(served: tuple[PredictorServer, Any], bundle_dir: Path) -> None:
    server, ready = served
    assert asked(ready.http_port, "GET", "/v1/rank")[0] == 405
    assert asked(ready.http_port, "GET", "/etc/passwd")[0] == 404
    with pytest.raises(DeviceError, match=f"cannot listen on HTTP port {ready.http_port}"):
        PredictorServer(bundle_dir, ServeConfig(port=0, http_port=ready.http_port, device="cpu")).start()
    server._gateway._is_open = False  # as while it drains
    assert asked(ready.http_port, "GET", "/readyz")[:2] == (503, "not ready\n")
    assert asked(ready.http_port, "GET", "/healthz")[0] == 200
    server._gateway._is_open = True


def test_the_gateway_has_the_tokens_and_certificates_of_grpc(bundle_dir: Path, tmp_path: Path) -> None:
    ca = trustme.CA()
    certificate = ca.issue_cert("localhost")
    (tmp_path / "server.pem").write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
    (tmp_path / "server.key").write_bytes(certificate.private_key_pem.bytes())
    (tmp_path / "tokens").write_text(f"search {TOKEN} 1\n")
    security = SecurityConfig(certificate=tmp_path / "server.pem", key=tmp_path / "server.key", tokens=tmp_path / "tokens")
    own = PredictorServer(bundle_dir, ServeConfig(port=0, http_port=0, device="cpu", security=security))
    port = own.start().http_port
    context = ssl.create_default_context()
    ca.configure_trust(context)

    def status(path: str, token: str | None = None) -> tuple[int, http.client.HTTPMessage]:
        connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=60)
        connection.request("GET", path, headers={} if token is None else {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.headers

    try:
        assert status("/healthz")[0] == 200
        for token in (None, "wrong", TOKEN[1:]):
            code, headers = status("/v1/models", token)
            assert (code, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert status("/v1/models", TOKEN)[0] == 200
        code, headers = max((status("/v1/models", TOKEN) for _ in range(5)), key=lambda outcome: outcome[0])
        assert (code, headers["Retry-After"]) == (429, "1")
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            asked(port, "GET", "/v1/models")
    finally:
        own.stop(0)
