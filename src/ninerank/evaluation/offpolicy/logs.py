"""Decision logs with columns mapped by a YAML file, those of `ninerank join` and the Open Bandit data among them.

Shape legend: N decisions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from ninerank.config import Config
from ninerank.errors import DataError
from ninerank.evaluation.logcolumns import read_columns
from ninerank.evaluation.offpolicy.feedback import WHAT_TO_LOG
from ninerank.features.hashing import hash_strings
from ninerank.metrics.rows import Array

__all__ = ["FORMATS", "JOINED", "OPEN_BANDIT", "DecisionColumns", "Decisions", "read_decisions"]

NUMBERS = ("reward", "propensity", "model", "base", "target", "place")


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
    joined = read_columns(paths, numbers, texts, {columns.propensity: WHAT_TO_LOG})
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
