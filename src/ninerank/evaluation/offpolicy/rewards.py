"""A reward model from the log itself: smoothed mean reward of each action, cross-fitted so that no row judges itself.

Shape legend: N decisions, A actions, C contexts (positions, segments; one if there are none).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ninerank.errors import DataError
from ninerank.metrics.bootstrap import hash_keys
from ninerank.metrics.rows import Array, check_groups

__all__ = ["CrossFit", "cross_fit"]


class CrossFit(NamedTuple):
    """model_N: expected reward of the logged action. base_N: of the target policy. Both from folds without the row's own."""

    model_N: Array
    base_N: Array


def cross_fit(
    reward_N: ArrayLike,
    action_N: ArrayLike,
    context_N: ArrayLike,
    target_CA: ArrayLike,
    *,
    cluster_N: ArrayLike | None = None,
    num_folds: int = 5,
    prior_rows: float = 20.0,
) -> CrossFit:
    """q(c, a) = (sum of rewards of a in c + prior_rows * mean) / (rows of a in c + prior_rows), for each fold from the others.

    Rows of one cluster are in one fold (Chernozhukov et al. 2018, "Double/Debiased Machine Learning"). The mean that small cells lean to is
    that of all rows of the other folds. target_CA: the target policy's chance of each action in each context. Raises DataError for
    columns that do not fit.
    """
    reward, action, context = np.asarray(reward_N, np.float64), np.asarray(action_N), np.asarray(context_N)
    target = np.asarray(target_CA, np.float64)
    if target.ndim != 2 or not reward.shape == action.shape == context.shape == (reward.size,):
        raise DataError(
            f"rewards {reward.shape}, actions {action.shape}, contexts {context.shape}, target {target.shape}: (N,), (C, A) are needed"
        )
    for what, column, end in (("action", action, target.shape[1]), ("context", context, target.shape[0])):
        if column.dtype.kind not in "iu" or (len(column) and not (column.min() >= 0 and column.max() < end)):
            raise DataError(f"{what}s are {column.dtype}: integers from 0 to {end - 1} are needed")
    key = np.arange(len(reward)) if cluster_N is None else check_groups(cluster_N, len(reward), what="clusters")
    fold_N = (hash_keys(key, seed=0) % np.uint64(num_folds)).astype(np.int64)
    cell_N, num_cells = context * target.shape[1] + action, target.size
    won, rows = (np.bincount(fold_N * num_cells + cell_N, by, num_folds * num_cells).reshape(num_folds, -1) for by in (reward, None))
    others_won, others_rows = won.sum(0) - won, rows.sum(0) - rows
    mean_F = others_won.sum(1, keepdims=True) / np.maximum(others_rows.sum(1, keepdims=True), 1)
    q_FCA = ((others_won + prior_rows * mean_F) / (others_rows + prior_rows)).reshape(num_folds, *target.shape)
    base_FC = (q_FCA * target).sum(2)
    return CrossFit(q_FCA[fold_N, context, action], base_FC[fold_N, context])
