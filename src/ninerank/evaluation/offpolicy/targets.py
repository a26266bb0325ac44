"""Target policies by name, and a decision log put to them.

Shape legend: N decisions, A actions, C contexts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ninerank.errors import DataError
from ninerank.evaluation.offpolicy.feedback import Feedback
from ninerank.evaluation.offpolicy.logs import DecisionColumns, Decisions, read_decisions
from ninerank.evaluation.offpolicy.rewards import cross_fit
from ninerank.evaluation.offpolicy.slates import Slates
from ninerank.metrics.rows import Array

__all__ = ["POLICIES", "Question", "Target", "lists_for", "question_of"]

POLICIES = "logging, uniform, log:PATH or column:NAME"


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


def _codes(first_N: pa.Array, second_M: pa.Array) -> tuple[int, list[Array]]:
    """Number of different values of both columns, and each column as numbers below it."""
    coded = pa.chunked_array([first_N, second_M]).combine_chunks().dictionary_encode()
    code: Array = coded.indices.to_numpy().astype(np.int64)
    return len(coded.dictionary), [code[: len(first_N)], code[len(first_N) :]]
