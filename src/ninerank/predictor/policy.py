"""Which version of a model answers: `policy.yaml` beside the versions of a model, read again when it changes.

{kind: latest}                                        the newest version (the default)
{kind: pinned, version: "7"}                          that version, whatever comes
{kind: canary, version: "8", percent: 5}              5% of sessions get 8, the others `stable` (default: the newest other one)
{kind: shadow, version: "8", percent: 10}             `stable` answers; 10% of requests are scored by 8 too, logged, never returned
"""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from ninerank.config import Config, read_mapping
from ninerank.features.hashing import hash_bytes
from ninerank.predictor.manifest import Label

__all__ = ["Canary", "Latest", "Pinned", "Policy", "Shadow", "in_share", "read_policy"]

SHARES = 1_000_000
Percent = Annotated[float, Field(ge=0, le=100)]


class Latest(Config):
    """The newest version that loads."""

    kind: Literal["latest"] = "latest"


class Pinned(Config):
    """One version; newer ones are not loaded."""

    kind: Literal["pinned"] = "pinned"
    version: Label


class Canary(Config):
    """`percent` of keys (sessions, else requests) go to `version`, the others to `stable`: a key keeps its side."""

    kind: Literal["canary"] = "canary"
    version: Label
    percent: Percent
    stable: Label | None = None


class Shadow(Config):
    """`percent` of requests are also scored by `version`, when nothing else waits; its answers go to its log alone."""

    kind: Literal["shadow"] = "shadow"
    version: Label
    percent: Percent = 100.0
    stable: Label | None = None


Policy: TypeAlias = Latest | Pinned | Canary | Shadow


class _File(Config):
    policy: Annotated[Policy, Field(discriminator="kind")]


def read_policy(path: Path) -> Policy:
    """The policy of a file; raises SpecError that names key and place."""
    return _File.parse({"policy": read_mapping(path)}, str(path)).policy


def in_share(key: str, percent: float, salt: str) -> bool:
    """Whether `key` is among `percent` of all keys; the same for ever, and independent between salts.

    >>> sum(in_share(f"user{n}", 10.0, "ctr 8") for n in range(10_000))
    1087
    """
    return hash_bytes(f"{salt}\0{key}".encode()) % SHARES < percent * (SHARES / 100)
