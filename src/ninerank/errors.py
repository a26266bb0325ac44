"""Errors that a user, a file or a peer can cause, one class per stage of the data's way.

    spec, recipe -> SpecError          log files, rows    -> DataError       checkpoints -> CheckpointError
    bundles      -> BundleError        rank requests      -> RequestError, DeadlineError
    queues       -> OverloadError      devices, kernels   -> DeviceError

Every message says what was wrong, the value that was met, and what is allowed.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "CheckpointError",
    "DataError",
    "DeadlineError",
    "DeviceError",
    "NinerankError",
    "OverloadError",
    "RequestError",
    "SpecError",
    "nearest",
]


class NinerankError(Exception):
    """Base of all errors that Ninerank raises on purpose; the CLI prints its message and exits with 1."""


class SpecError(NinerankError):
    """A feature spec, a recipe or another configuration is wrong."""


class DataError(NinerankError):
    """A log file, a column or a row is wrong."""


class CheckpointError(NinerankError):
    """A checkpoint is missing, truncated, corrupt or of another spec."""


class BundleError(NinerankError):
    """A bundle is missing, truncated, corrupt, of another spec, or misses its golden scores."""


class RequestError(NinerankError):
    """A rank request is wrong; gRPC INVALID_ARGUMENT."""


class DeadlineError(NinerankError):
    """A rank request cannot be answered before its deadline; gRPC DEADLINE_EXCEEDED."""


class OverloadError(NinerankError):
    """A bound (queue, message size, candidates in flight) is reached; gRPC RESOURCE_EXHAUSTED.

    retry_after_ms: when trying again may be of use; None: never, the request itself is too large.
    """

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeviceError(NinerankError):
    """The device or kernel that was asked for cannot run here."""


def nearest(key: str, valid: Iterable[str]) -> str:
    """Phrase that names the valid key nearest to `key`, then all valid ones.

    >>> nearest("batchsize", ["batch_size", "seed"])
    "did you mean 'batch_size'? valid: batch_size, seed"
    >>> nearest("zzz", ["batch_size", "seed"])
    'valid: batch_size, seed'
    """
    names = sorted(valid)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"
