"""Logged decisions as the estimators take them: what was shown, with which probability, and what came of it.

Shape legend: N decisions, A actions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.rows import Array, check_groups

__all__ = ["WHAT_TO_LOG", "Feedback"]

WHAT_TO_LOG = (
    "log with each decision the probability with which the serving policy took it (for a list: of each item at its place), "
    "from a policy that gives every candidate some chance"
)


@dataclass(frozen=True)
class Feedback:
    """One row a decision, float64 (N,) each.

    reward_N: what came of it, a click for instance. propensity_N: probability with which the logging policy took the
    action. target_N: probability with which the target policy takes that action. cluster_N: int64 keys of requests or users
    whose rows depend on one another, or None. model_N: reward that a model expects of the logged action. base_N: reward that it
    expects of the target policy, sum_a pi(a | x) q(x, a). The latter two are None without a model; it must not have seen
    the row's own reward (see `cross_fit`).
    Raises DataError for missing or impossible probabilities, and says what to log.
    """

    reward_N: Array
    propensity_N: Array
    target_N: Array
    cluster_N: Array | None = None
    model_N: Array | None = None
    base_N: Array | None = None

    @classmethod
    def of(
        cls,
        reward_N: ArrayLike,
        propensity_N: ArrayLike | None,
        target_N: ArrayLike,
        *,
        cluster_N: ArrayLike | None = None,
        model_N: ArrayLike | None = None,
        base_N: ArrayLike | None = None,
    ) -> Self:
        """Check columns and join them."""
        reward = _finite("rewards", reward_N, None)
        if propensity_N is None:
            raise DataError(f"the log has no propensities, without which no policy but its own can be valued: {WHAT_TO_LOG}")
        propensity, target = np.asarray(propensity_N, np.float64), _finite("target probabilities", target_N, len(reward))
        if propensity.shape != reward.shape:
            raise DataError(f"propensities have shape {propensity.shape}: {reward.shape} is needed, one per decision")
        wrong = ~((propensity > 0) & (propensity <= 1))
        if wrong.any():
            row = int(wrong.argmax())
            more = f" (and {int(wrong.sum()) - 1} more)" if wrong.sum() > 1 else ""
            raise DataError(f"propensity {float(propensity[row])!r} in row {row}{more}: above 0 and at most 1 is needed; {WHAT_TO_LOG}")
        wrong = (target < 0) | (target > 1)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"target probability {float(target[row])!r} in row {row}: a number in [0, 1] is needed")
        if (model_N is None) != (base_N is None):
            raise DataError("a reward model needs both what it expects of the logged action (model_N) and of the target policy (base_N)")
        clusters = None if cluster_N is None else check_groups(cluster_N, len(reward), what="clusters")
        model = None if model_N is None else _finite("expected rewards", model_N, len(reward))
        base = None if base_N is None else _finite("expected rewards of the target", base_N, len(reward))
        return cls(reward, propensity, target, clusters, model, base)

    @classmethod
    def of_actions(
        cls,
        reward_N: ArrayLike,
        action_N: ArrayLike,
        propensity_N: ArrayLike | None,
        target_NA: ArrayLike,
        *,
        model_NA: ArrayLike | None = None,
        cluster_N: ArrayLike | None = None,
    ) -> Self:
        """From the target policy's probabilities of all actions, and what a model expects of each.

        action_N: place of the action among the A. Rows of target_NA sum to 1. Raises DataError if they do not.
        """
        action, target = np.asarray(action_N), np.asarray(target_NA, np.float64)
        if action.ndim != 1 or action.dtype.kind not in "iu" or target.shape[:1] != action.shape or target.ndim != 2:
            raise DataError(f"actions {action.dtype} {action.shape}, target {target.shape}: integers (N,) and numbers (N, A) are needed")
        if len(action) and not (action.min() >= 0 and action.max() < target.shape[1]):
            raise DataError(f"an action is {action.min() if action.min() < 0 else action.max()}: 0 to {target.shape[1] - 1} is allowed")
        if not np.allclose(target.sum(1), 1, atol=1e-6):
            row = int(np.abs(target.sum(1) - 1).argmax())
            raise DataError(f"target probabilities of row {row} sum to {target[row].sum():.6g}: 1 is needed")
        row_N = np.arange(len(action))
        model, base = None, None
        if model_NA is not None:
            expected = np.asarray(model_NA, np.float64)
            if expected.shape != target.shape:
                raise DataError(f"expected rewards have shape {expected.shape}: {target.shape} is needed, one per action")
            model, base = expected[row_N, action], (target * expected).sum(1)
        return cls.of(reward_N, propensity_N, target[row_N, action], cluster_N=cluster_N, model_N=model, base_N=base)

    def __len__(self) -> int:
        return len(self.reward_N)

    def __getitem__(self, rows: Any) -> "Feedback":
        """The rows chosen by a slice, a mask or an array of numbers."""
        optional = (None if column is None else column[rows] for column in (self.cluster_N, self.model_N, self.base_N))
        return Feedback(self.reward_N[rows], self.propensity_N[rows], self.target_N[rows], *optional)

    @property
    def weight_N(self) -> Array:
        """Importance weights pi(a | x) / pi_0(a | x)."""
        weight: Array = self.target_N / self.propensity_N
        return weight


def _finite(what: str, values: ArrayLike, num_rows: int | None) -> Array:
    column = np.asarray(values, np.float64)
    if column.ndim != 1 or (num_rows is not None and len(column) != num_rows):
        raise DataError(f"{what} have shape {column.shape}: ({'N' if num_rows is None else num_rows},) is needed, one per decision")
    if not np.isfinite(column).all():
        row = int((~np.isfinite(column)).argmax())
        raise DataError(f"{what}: {float(column[row])!r} in row {row}: finite numbers are needed")
    return column
