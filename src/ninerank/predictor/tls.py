"""TLS for gRPC servers and clients: certificates from PEM files, those of a server read again when they change."""

import logging
from collections.abc import Callable
from pathlib import Path

import grpc

from ninerank.errors import SpecError
from ninerank.predictor.security import SecurityConfig

__all__ = ["channel_credentials", "server_credentials"]

log = logging.getLogger(__name__)


def server_credentials(config: SecurityConfig) -> grpc.ServerCredentials | None:
    """Credentials that follow the files of `config`; None where it asks for no TLS. Raises SpecError for files that cannot be read."""
    if config.certificate is None or config.key is None:
        return None
    files = [config.certificate, config.key, *([] if config.client_ca is None else [config.client_ca])]
    first = [_read(file) for file in files]
    follow = _follower(files, first)
    return grpc.dynamic_ssl_server_credentials(_configuration(first), follow, config.client_ca is not None)  # type: ignore[arg-type]


def channel_credentials(ca: Path | None, certificate: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """A client's: who signs the server's certificate (None: whoever this machine trusts), and its own certificate for mTLS."""
    chain, own = (None, None) if certificate is None or key is None else (_read(certificate), _read(key))
    return grpc.ssl_channel_credentials(None if ca is None else _read(ca), own, chain)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from None
    if b"-----BEGIN " not in data:
        raise SpecError(f"{path}: is no PEM file")
    return data


def _configuration(parts: list[bytes]) -> grpc.ServerCertificateConfiguration:
    certificate, key, *client_ca = parts
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None)


def _follower(files: list[Path], first: list[bytes]) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    """gRPC asks at every handshake; None tells it to go on with what it has."""
    held = first

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal held
        try:
            now = [_read(file) for file in files]
        except SpecError as error:
            log.error("%s; the certificate from before stays in force", error)
            return None
        if now == held:
            return None
        held = now
        log.info("%s: the certificate changed and is in force", files[0])
        return _configuration(now)

    return fetch
