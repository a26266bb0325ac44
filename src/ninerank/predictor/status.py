"""What a caller is told when a call fails: a status by its gRPC name, one line of text, and when to try again."""

import logging
from dataclasses import dataclass

from ninerank.errors import BundleError, DeadlineError, NinerankError, OverloadError, RequestError
from ninerank.predictor.host import NoAdminError, UnknownModelError
from ninerank.predictor.security import UnauthenticatedError

__all__ = ["Refusal", "refusal"]

log = logging.getLogger(__name__)

MAX_MESSAGE_LENGTH = 1_000  # of an error: it travels in a header, and peers bound these
# The first class that fits decides.
_STATUS: tuple[tuple[type[NinerankError], str], ...] = (
    (UnknownModelError, "NOT_FOUND"),
    (RequestError, "INVALID_ARGUMENT"),
    (DeadlineError, "DEADLINE_EXCEEDED"),
    (OverloadError, "RESOURCE_EXHAUSTED"),
    (UnauthenticatedError, "UNAUTHENTICATED"),
    (NoAdminError, "FAILED_PRECONDITION"),
    (BundleError, "FAILED_PRECONDITION"),
)


@dataclass(frozen=True)
class Refusal:
    """status: name of a gRPC status. retry_after_ms: None where trying again is no use."""

    status: str
    message: str
    retry_after_ms: int | None = None


def refusal(error: Exception, request_id: str) -> Refusal:
    """What the client is told of `error`; of a fault of our own it learns the request id alone, the log has the rest."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            text = str(error)
            shown = text if len(text) <= MAX_MESSAGE_LENGTH else text[:MAX_MESSAGE_LENGTH] + "..."
            return Refusal(status, f"{shown} (request {request_id})", getattr(error, "retry_after_ms", None))
    log.error("request %s failed", request_id, exc_info=error)
    return Refusal("INTERNAL", f"internal error (request {request_id})")
