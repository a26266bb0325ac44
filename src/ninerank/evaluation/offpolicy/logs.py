"""Decision logs with columns mapped by a YAML file, the Open Bandit data among them, and target policies by name.

Shape legend: N decisions, A actions, C contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from ninerank.config import Config
from ninerank.errors import DataError, nearest
from ninerank.evaluation.offpolicy.feedback import WHAT_TO_LOG, Feedback
from ninerank.evaluation.offpolicy.rewards import cross_fit
from ninerank.evaluation.offpolicy.slates import Slates
from ninerank.features.columns import column_of, conform
from ninerank.features.files import ArrowLog, Dialect, LogFile, ParquetLog, TextLog, expand, format_of
from ninerank.features.hashing import hash_strings
from ninerank.metrics.rows import Array

__all__ = [
    "FORMATS",
    "JOINED",
    "OPEN_BANDIT",
    "POLICIES",
    "DecisionColumns",
    "Decisions",
    "Question",
    "Target",
    "lists_for",
    "question_of",
    "read_decisions",
]

NUMBERS = ("reward", "propensity", "model", "base", "target", "place")
POLICIES = "logging, uniform, log:PATH or column:NAME"


class DecisionColumns(Config):
    """Which column holds what, one row a decision."""

    reward: str = Field(default="reward", description="what came of the decision, a click for instance")
    action: str | None = Field(default="action", description="what was shown")
    propensity: str | None = Field(default="propensity", description="probability with which the logging policy showed it")
    context: str | None = Field(default=None, description="position or segment: policies are told apart by it")
    cluster: str | None = Field(default=None, description="request or user; its rows depend on one another")
    list: str | None = Field(default=None, description="request whose rows are the places of one list")
    place: str | None = Field(default=None, description="place in the list, from 0; only its order counts")
    model: str | None = Field(default=None, description="reward that a model expects of the logged action")
    base: str | None = Field(default=None, description="reward that the model expects of the target policy")


# Saito et al. 2021, "Open Bandit Dataset and Pipeline".
OPEN_BANDIT = DecisionColumns(reward="click", action="item_id", propensity="propensity_score", context="position")
# What `ninerank join` writes; the label's column is called as the label is.
JOINED = DecisionColumns(
    reward="click", action="candidate_id", context="position", cluster="request_id", list="request_id", place="position"
)
FORMATS = {"columns": DecisionColumns(), "openbandit": OPEN_BANDIT, "joined": JOINED}


@dataclass(frozen=True)
class Decisions:
    """Columns of a decision log; action and context as strings, None where the log has none. target_N: a column asked for by name.

    list_N: int64 keys of lists. place_N: int64 places in them.
    """

    reward_N: Array
    propensity_N: Array
    action_N: pa.Array | None
    context_N: pa.Array
    cluster_N: Array | None
    model_N: Array | None
    base_N: Array | None
    target_N: Array | None
    list_N: Array | None
    place_N: Array | None


def read_decisions(paths: str | Path | Sequence[str | Path], columns: DecisionColumns, target: str | None = None) -> Decisions:
    """Read files or directories of Parquet, Arrow, CSV or TSV; about 50 bytes a decision are held.

    target: column with the target policy's probability of the logged action, if there is one.
    Raises DataError for a column that is missing or of a wrong type, or a null; without propensities it says what to log.
    """
    if columns.propensity is None:
        raise DataError(f"no propensity column is named, and without one no policy but the log's own can be valued: {WHAT_TO_LOG}")
    wanted = {"target": target, **columns.model_dump()}
    numbers = {name: column for name, column in wanted.items() if column and name in NUMBERS}
    texts = {name: column for name, column in wanted.items() if column and name not in NUMBERS}
    found: dict[str, list[pa.Array]] = {name: [] for name in (*numbers, *texts)}
    for path in _files(paths):
        file = _open(path)
        if columns.propensity not in file.names:
            raise DataError(
                f"{path}: propensity column {columns.propensity!r} is missing ({nearest(columns.propensity, file.names)}); {WHAT_TO_LOG}"
            )
        missing = [column for column in (*numbers.values(), *texts.values()) if column not in file.names]
        if missing:
            raise DataError(f"{path}: column {missing[0]!r} is missing; {nearest(missing[0], file.names)}")
        for block in range(len(file.block_rows)):
            for batch in file.read(block, list(dict.fromkeys((*numbers.values(), *texts.values())))):
                for name, column in numbers.items():
                    hint = f"; {WHAT_TO_LOG}" if name == "propensity" else ""
                    found[name].append(_whole(conform(column_of(batch, column), pa.float64(), column), path, column, hint))
                for name, column in texts.items():
                    found[name].append(_whole(conform(column_of(batch, column), pa.string(), column), path, column))
    joined = {name: pa.chunked_array(parts).combine_chunks() for name, parts in found.items() if parts}
    if not joined:
        raise DataError(f"{paths}: no decisions")
    number = {name: joined[name].to_numpy() for name in numbers}
    rows = len(number["reward"])
    return Decisions(
        number["reward"],
        number["propensity"],
        joined.get("action"),
        joined["context"] if "context" in joined else pa.repeat("", rows),
        hash_strings(joined["cluster"]).view(np.int64) if "cluster" in joined else None,
        number.get("model"),
        number.get("base"),
        number.get("target"),
        hash_strings(joined["list"]).view(np.int64) if "list" in joined else None,
        number["place"].astype(np.int64) if "place" in number else None,
    )


@dataclass(frozen=True)
class Target:
    """A policy to be valued.

    "logging": the log's own. "uniform": over the actions that were logged. "log:PATH": the shares of actions in another log, by context; a
    policy that looks at nothing else. "column:NAME": probability of the logged action in a column.
    """

    kind: str
    of: str = ""

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises DataError for a policy that is not there."""
        kind, _, of = text.partition(":")
        if kind not in ("logging", "uniform", "log", "column") or (kind in ("log", "column")) != bool(of):
            raise DataError(f"policy {text!r}: {POLICIES} is needed")
        return cls(kind, of)


class Question(NamedTuple):
    """Decisions under a target policy.

    unsupported_N: the target's probability of actions never logged in the row's context, None where it is not known.
    caveats: what no figure of the log tells.
    """

    feedback: Feedback
    unsupported_N: Array | None
    caveats: tuple[str, ...]


def question_of(rows: Decisions, target: Target, columns: DecisionColumns, *, with_model: bool = True) -> Question:
    """What a log is asked about a target policy.

    The reward model is the log's own columns where they are mapped, else cross-fitted means by context and action.
    Raises DataError where the log lacks what the policy needs.
    """
    model_N, base_N = rows.model_N, rows.base_N
    unsupported_N: Array | None = None
    caveats: tuple[str, ...] = ()
    if target.kind == "logging":
        target_N = rows.propensity_N
    elif target.kind == "column":
        assert rows.target_N is not None, "the column was read"
        target_N = rows.target_N
    else:
        if rows.action_N is None:
            raise DataError(f"policy {target.kind!r} needs an action column: what was shown")
        other = (
            read_decisions(target.of, columns.model_copy(update=dict.fromkeys(("cluster", "model", "base", "list", "place"))))
            if target.of
            else rows
        )
        assert other.action_N is not None
        actions, (action_N, other_action_M) = _codes(rows.action_N, other.action_N)
        contexts, (context_N, other_context_M) = _codes(rows.context_N, other.context_N)
        logged_CA = np.bincount(context_N * actions + action_N, minlength=contexts * actions).reshape(contexts, actions)
        if target.kind == "uniform":
            chance_CA = np.full((contexts, actions), 1 / actions)
        else:
            shown_CA = np.bincount(other_context_M * actions + other_action_M, minlength=contexts * actions).reshape(contexts, actions)
            if not shown_CA.sum(1)[np.unique(context_N)].all():
                raise DataError(f"{target.of}: has no decisions in some context of the log, so the policy's choice there is not known")
            chance_CA = shown_CA / np.maximum(shown_CA.sum(1, keepdims=True), 1)
            shares = f"the target is the share of each action in {len(other_action_M)} decisions of {target.of}"
            caveats = (f"{shares}, by {columns.context or 'nothing'} alone; the error of these shares is not in the intervals",)
        target_N = chance_CA[context_N, action_N]
        unsupported_N = np.where(logged_CA > 0, 0.0, chance_CA).sum(1)[context_N]
        if with_model and model_N is None:
            model_N, base_N = cross_fit(rows.reward_N, action_N, context_N, chance_CA, cluster_N=rows.cluster_N)
    if not with_model:
        model_N = base_N = None
    feedback = Feedback.of(rows.reward_N, rows.propensity_N, target_N, cluster_N=rows.cluster_N, model_N=model_N, base_N=base_N)
    return Question(feedback, unsupported_N, caveats)


def lists_for(rows: Decisions, target: Target) -> Slates:
    """Lists under a target policy, "logging" or "column:NAME", from the places that are rows.

    Raises DataError where the log names no lists and places, or the policy is one that lists cannot be valued under.
    """
    if rows.list_N is None or rows.place_N is None:
        raise DataError("lists need the columns `list` (request whose rows are one list) and `place`: name both with --columns")
    if target.kind not in ("logging", "column"):
        raise DataError(f"policy {target.kind!r} of lists: logging or column:NAME is needed, the target's probability at each place")
    target_N = rows.propensity_N if target.kind == "logging" else rows.target_N
    assert target_N is not None, "the column was read"
    # Places may begin anywhere and have gaps (candidates that were not shown): what counts is their order.
    order = np.lexsort((rows.place_N, rows.list_N))
    sorted_N = rows.list_N[order]
    place_N = np.empty(len(order), np.int64)
    place_N[order] = np.arange(len(order)) - np.searchsorted(sorted_N, sorted_N)
    # One cluster a list, so that every row of a list has the list's own.
    clusters = rows.cluster_N if rows.cluster_N is not None else rows.list_N
    return Slates.of_rows(rows.list_N, place_N, rows.reward_N, rows.propensity_N, target_N, cluster_N=clusters)


def _files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files, those of directories, and those of directories of partitions."""
    given = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    inside = [sorted(path.rglob("*.parquet")) if path.is_dir() else [] for path in given]
    return expand([file for path, found in zip(given, inside, strict=True) for file in (found or [path])])


def _open(path: Path) -> LogFile:
    kind = format_of(path)
    if kind == "parquet":
        return ParquetLog(path)
    if kind == "arrow":
        return ArrowLog(path)
    if kind in ("csv", "tsv"):
        return TextLog(path, Dialect("," if kind == "csv" else "\t"), {})
    raise DataError(f"{path}: ending {path.suffix!r}: .parquet, .arrow, .csv or .tsv is needed")


def _whole(array: pa.Array, path: Path, column: str, hint: str = "") -> pa.Array:
    if array.null_count:
        raise DataError(f"{path}: column {column!r} has {array.null_count} nulls, every decision needs a value{hint}")
    return array


def _codes(first_N: pa.Array, second_M: pa.Array) -> tuple[int, list[Array]]:
    """Number of different values of both columns, and each column as numbers below it."""
    coded = pa.chunked_array([first_N, second_M]).combine_chunks().dictionary_encode()
    code: Array = coded.indices.to_numpy().astype(np.int64)
    return len(coded.dictionary), [code[: len(first_N)], code[len(first_N) :]]
