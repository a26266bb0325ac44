"""Tokens, certificates and quotas: who is not known gets nothing but health."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ninerank.errors import NinerankError, OverloadError, SpecError
from ninerank.predictor import security as security_module
from ninerank.predictor.adminclient import AdminClient
from ninerank.predictor.client import ClientSecurity, PredictorClient, build_request
from ninerank.predictor.security import Guard, SecurityConfig, TokenFile, UnauthenticatedError
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer

TOKEN, OTHER, ADMIN = "a-token-of-24-characters", "b-token-of-24-characters", "c-token-of-24-characters"
USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS: dict[str, Any] = {"item_id": ["i1", "i2"], "price": [1.5, 2.5], "tags": [["t1"], []], "city": ["rome", "oslo"]}
METHODS = ("Predictor/Rank", "Predictor/Score", "Predictor/ModelStatus", "Predictor/RankStream")
Start = Callable[..., tuple[PredictorServer, str, str]]


@pytest.fixture
def start(bundle_dir: Path) -> Iterator[Start]:
    running: list[PredictorServer] = []

    def begin(**security: Any) -> tuple[PredictorServer, str, str]:
        config = ServeConfig(port=0, admin_port=0, device="cpu", security=SecurityConfig(**security))
        running.append(PredictorServer(bundle_dir, config))
        ready = running[-1].start()
        return running[-1], f"localhost:{ready.port}", f"localhost:{ready.admin_port}"

    yield begin
    for server in running:
        server.stop(0)


def token_file(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def is_healthy(channel: grpc.Channel) -> bool:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=30)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def status_of(channel: grpc.Channel, method: str, token: str | None) -> grpc.StatusCode:
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    data = build_request(USER, ITEMS).SerializeToString()
    try:
        if method.endswith("Stream"):
            list(channel.stream_stream(f"/ninerank.v1.{method}")(iter([data]), timeout=30, metadata=metadata))
        else:
            channel.unary_unary(f"/ninerank.v1.{method}")(data, timeout=30, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_without_a_token_nothing_but_health_is_answered(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = token_file(tmp_path / "tokens", "# callers", f"search {TOKEN}", f"ads {OTHER} 1000")
    admins = token_file(tmp_path / "admins", f"operator {ADMIN}")
    with caplog.at_level(logging.DEBUG, logger="ninerank"):
        server, target, admin = start(tokens=tokens, admin_tokens=admins)
        with grpc.insecure_channel(target) as channel, grpc.insecure_channel(admin) as admin_channel:
            assert is_healthy(channel)
            assert is_healthy(admin_channel)
            for method in METHODS:
                for token in (None, "", "wrong" * 5, ADMIN, TOKEN[:-1]):
                    assert status_of(channel, method, token) is grpc.StatusCode.UNAUTHENTICATED, (method, token)
            for token in (None, TOKEN):
                assert status_of(admin_channel, "Admin/LoadModel", token) is grpc.StatusCode.UNAUTHENTICATED
                assert status_of(admin_channel, "Admin/UnloadModel", token) is grpc.StatusCode.UNAUTHENTICATED
            assert status_of(admin_channel, "Predictor/Rank", ADMIN) is grpc.StatusCode.UNIMPLEMENTED
            assert status_of(channel, "Admin/LoadModel", TOKEN) is grpc.StatusCode.UNIMPLEMENTED
            assert status_of(channel, "Predictor/Rank", TOKEN) is grpc.StatusCode.OK
            assert status_of(channel, "Predictor/Rank", OTHER) is grpc.StatusCode.OK
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            with pytest.raises(grpc.RpcError) as refusal:
                list(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
            assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with PredictorClient(target, security=ClientSecurity(token=TOKEN)) as client:
            assert len(client.rank(USER, ITEMS).scores) == 2
        with PredictorClient(target) as client, pytest.raises(NinerankError, match="does not let this client in: .*Bearer TOKEN"):
            client.rank(USER, ITEMS)
        with AdminClient(admin, security=ClientSecurity(token=ADMIN)) as client, pytest.raises(NinerankError, match="serves one bundle"):
            client.load("small", "8")
    assert not [secret for secret in (TOKEN, OTHER, ADMIN) if secret in caplog.text]
    refused = server.telemetry.registry.get_sample_value("ninerank_requests_total", {"status": "UNAUTHENTICATED"})
    assert refused == 5 * len(METHODS) + 1


def test_tokens_are_followed_as_their_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security_module, "CHECK_S", 0.0)
    path = token_file(tmp_path / "tokens", f"search {TOKEN}")
    tokens = TokenFile(path)
    found = tokens.client(TOKEN)
    assert found is not None
    assert found.name == "search"
    assert tokens.client(OTHER) is None
    token_file(path, f"ads {OTHER}  # the new one")
    assert tokens.client(TOKEN) is None
    assert tokens.client(OTHER) is not None
    for wrong in ("ads", "ads short", f"ads {OTHER} fast", ""):
        path.write_text(wrong)
        assert tokens.client(OTHER) is not None, wrong
    path.unlink()
    assert tokens.client(OTHER) is not None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("search", r"tokens:1: has 1 words; `name token \[requests_per_s\]` is needed"),
        ("\nsearch secret", "tokens:2: the token of 'search' has 6 characters, at least 16 are needed"),
        (f"search {TOKEN} -3", "tokens:1: requests_per_s is '-3', a number above 0 is needed"),
        (f"search {TOKEN}\nads {TOKEN}", "tokens:2: the token of 'ads' is that of 'search' too"),
        ("# nobody", "tokens: holds no token"),
    ],
)
def test_a_wrong_token_file_is_told_without_its_tokens(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(SpecError, match=wrong) as told:
        TokenFile(path)
    assert TOKEN not in str(told.value)
    with pytest.raises(SpecError, match="cannot be read as a token file"):
        TokenFile(tmp_path / "nowhere")


def test_a_client_has_its_quota_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    guard = Guard(TokenFile(token_file(tmp_path / "tokens", f"search {TOKEN}", f"ads {OTHER} 2")), 5.0)
    for token, rate in ((TOKEN, 5), (OTHER, 2)):
        header = f"bearer {token}"
        assert {guard.enter(header) for _ in range(rate)} == {"search" if token == TOKEN else "ads"}
        with pytest.raises(OverloadError, match=f"has used up its {rate} requests a second") as refused:
            guard.enter(header)
        assert refused.value.retry_after_ms == 1000 // rate
    now[0] += 0.2
    assert guard.enter(f"Bearer {TOKEN}") == "search"
    with pytest.raises(OverloadError):
        guard.enter(f"Bearer {TOKEN}")
    for header in (None, "", TOKEN, f"Basic {TOKEN}", "Bearer nobody"):
        with pytest.raises(UnauthenticatedError):
            guard.enter(header)
    assert Guard(None, None).enter(None) == ""
    named = Guard(None, 1.0)
    assert named.enter(None, "search.example") == "search.example"
    with pytest.raises(OverloadError):
        named.enter(None, "search.example")


def write(certificate: trustme.LeafCert, folder: Path, name: str) -> tuple[Path, Path]:
    """PEM files, changed as certificates are: written aside and renamed."""
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    for path, data in ((chain, b"".join(part.bytes() for part in certificate.cert_chain_pems)), (key, certificate.private_key_pem.bytes())):
        aside = path.with_suffix(".new")
        aside.write_bytes(data)
        aside.replace(path)
    return chain, key


def test_tls_shows_a_certificate_and_follows_its_files(start: Start, tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    certificate, key = write(old.issue_cert("localhost"), tmp_path, "server")
    (tmp_path / "old.pem").write_bytes(old.cert_pem.bytes())
    (tmp_path / "new.pem").write_bytes(new.cert_pem.bytes())
    _, target, _ = start(certificate=certificate, key=key)

    def ranks(ca: str) -> bool:
        with PredictorClient(target, security=ClientSecurity(tls=True, ca=tmp_path / ca)) as client:
            try:
                return len(client.rank(USER, ITEMS, timeout_ms=10_000).scores) == 2
            except NinerankError:
                return False

    assert ranks("old.pem")
    assert not ranks("new.pem")
    write(new.issue_cert("localhost"), tmp_path, "server")
    assert ranks("new.pem")
    assert not ranks("old.pem")
    certificate.write_text("no certificate")  # half a change: the one in force stays
    assert ranks("new.pem")
    with PredictorClient(target) as client, pytest.raises(NinerankError):
        client.rank(USER, ITEMS, timeout_ms=2_000)


def test_mtls_lets_in_nobody_without_a_certificate(start: Start, tmp_path: Path) -> None:
    ours, theirs = trustme.CA(), trustme.CA()
    (tmp_path / "ca.pem").write_bytes(ours.cert_pem.bytes())
    certificate, key = write(ours.issue_cert("localhost"), tmp_path, "server")
    known = write(ours.issue_cert("search.example", common_name="search"), tmp_path, "known")
    forged = write(theirs.issue_cert("search.example", common_name="search"), tmp_path, "forged")
    _, target, admin = start(certificate=certificate, key=key, client_ca=tmp_path / "ca.pem", requests_per_s=1)
    with PredictorClient(target, security=ClientSecurity(True, tmp_path / "ca.pem", *known)) as client:
        assert len(client.rank(USER, ITEMS).scores) == 2
        with pytest.raises(OverloadError, match="client 'search' has used up its 1 requests a second"):
            all(client.rank(USER, ITEMS) for _ in range(20))
    for own in ((), forged):
        with PredictorClient(target, security=ClientSecurity(True, tmp_path / "ca.pem", *own)) as client, pytest.raises(NinerankError):
            client.rank(USER, ITEMS, timeout_ms=3_000)
        admins = AdminClient(admin, security=ClientSecurity(True, tmp_path / "ca.pem", *own), timeout_s=3)
        with admins, pytest.raises(NinerankError, match="no server answers|no answer"):
            admins.load()
    admins = AdminClient(admin, security=ClientSecurity(True, tmp_path / "ca.pem", *known))
    with admins, pytest.raises(NinerankError, match="serves one bundle"):
        admins.load()


def test_settings_that_do_not_go_together_are_refused(bundle_dir: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"certificate": "a"}, "certificate and key go together"),
        ({"client_ca": "a"}, "client_ca needs certificate and key"),
        ({"requests_per_s": 5}, "requests_per_s needs tokens or client_ca"),
    ):
        with pytest.raises(SpecError, match=message):
            SecurityConfig.parse(wrong, "security")
    (tmp_path / "a").write_text("x")
    for security, message in (
        (SecurityConfig(certificate=tmp_path / "a", key=tmp_path / "a"), "a: is no PEM file"),
        (SecurityConfig(certificate=tmp_path / "b", key=tmp_path / "a"), "b: cannot be read"),
    ):
        with pytest.raises(SpecError, match=message):
            PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", security=security))
    with pytest.raises(SpecError, match=r"the admin port at 0\.0\.0\.0 is open to the network"):
        PredictorServer(bundle_dir, ServeConfig(host="0.0.0.0", port=0, admin_port=0, device="cpu"))
