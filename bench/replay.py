"""What measuring a replayed log costs: exact and bucketed AUC, GAUC over many groups, intervals, against scikit-learn and pandas.

A log of --rows rows (float32 scores like click rates, click labels, --groups users) arrives in record batches of --batch rows, as a
reader gives them. Timed is the whole way: updates with every check, then the value. Peers get their columns whole and unchecked:

    scikit-learn        roc_auc_score, on one sort of all scores
    pandas              the quick way to GAUC: ranks within groups, then Mann-Whitney from sums (a loop over groups takes hours)

Values are compared before anything is timed; exact AUC is also counted by two accumulators and merged. The peak of the memory beyond
the log itself is measured in a run of its own.
"""

import argparse
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from harness import Result, interleave
from ninerank.metrics import AUC, GAUC, AUCInterval, Bootstrap, BucketedAUC, LogLoss, MetricInterval

Array = npt.NDArray[Any]
SEED = 1
REPLICATES = 200


class Log:
    """Labels, scores and users, whole and in batches."""

    def __init__(self, num_rows: int, num_groups: int, batch: int) -> None:
        rng = np.random.default_rng(SEED)
        self.score = rng.beta(1, 15, num_rows).astype(np.float32)
        self.label = rng.random(num_rows) < self.score
        self.group = rng.integers(0, num_groups, num_rows)
        self.batch = batch

    def batches(self) -> Iterator[slice]:
        for start in range(0, len(self.label), self.batch):
            yield slice(start, start + self.batch)


def exact(log: Log) -> float:
    metric = AUC()
    for own in log.batches():
        metric.update(log.label[own], log.score[own])
    return metric.value()


def bucketed(log: Log) -> tuple[float, float]:
    metric = BucketedAUC()
    for own in log.batches():
        metric.update(log.label[own], log.score[own])
    return metric.value()


def within(log: Log) -> float:
    metric = GAUC()
    for own in log.batches():
        metric.update(log.label[own], log.score[own], None, log.group[own])
    return metric.value()


def delong(log: Log) -> float:
    metric = AUCInterval(clustered=True)
    for own in log.batches():
        metric.update(log.label[own], log.score[own], None, log.group[own])
    return metric.value().standard_error


def loss_interval(log: Log) -> float:
    metric = MetricInterval(LogLoss)
    for own in log.batches():
        metric.update(log.label[own], log.score[own], None, log.group[own])
    return metric.value().standard_error


def resampled(log: Log) -> float:
    metric = Bootstrap(LogLoss, REPLICATES)
    for own in log.batches():
        metric.update(log.label[own], log.score[own], cluster_B=log.group[own])
    return metric.value().standard_error


def by_scikit_learn(log: Log) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(log.label, log.score))


def by_pandas(log: Log) -> float:
    import pandas as pd  # noqa: TID251 - a peer to be measured, here alone

    table = pd.DataFrame({"group": log.group, "score": log.score, "label": log.label})
    table["rank"] = table.groupby("group", sort=False)["score"].rank()
    table["won"] = table["rank"] * table["label"]
    sums = table.groupby("group", sort=False).agg(won=("won", "sum"), positive=("label", "sum"), rows=("label", "size"))
    both = sums[(sums.positive > 0) & (sums.positive < sums.rows)]
    auc = (both.won - both.positive * (both.positive + 1) / 2) / (both.positive * (both.rows - both.positive))
    return float((auc * both.rows).sum() / both.rows.sum())


def check(log: Log) -> None:
    """Refuse to time what does not agree."""
    value, first, second = exact(log), AUC(), AUC()
    for number, own in enumerate(log.batches()):
        (second if number % 2 else first).update(log.label[own], log.score[own])
    binned, bound = bucketed(log)
    differences = {
        "scikit-learn": abs(value - by_scikit_learn(log)),
        "two accumulators merged": abs(value - first.merge(second).value()),
        "pandas": abs(within(log) - by_pandas(log)),
        "bins beyond their bound": max(0.0, abs(value - binned) - bound),
    }
    for name, difference in differences.items():
        if not difference < 1e-9:
            raise SystemExit(f"{name}: differs by {difference}")


def peak_mib(call: Callable[[Log], object], log: Log) -> float:
    """Largest memory held at once while measuring, beyond the log itself (NumPy tells tracemalloc of its arrays)."""
    tracemalloc.start()
    try:
        call(log)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--groups", type=int, default=500_000)
    parser.add_argument("--batch", type=int, default=262_144)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with Result("replay", shapes={"rows": options.rows, "groups": options.groups, "batch": options.batch}) as result:
        log = Log(options.rows, options.groups, options.batch)
        check(log)
        calls = {"auc": exact, "bucketed_auc": bucketed, "gauc": within, "sklearn": by_scikit_learn, "pandas": by_pandas}
        times = interleave({name: partial(call, log) for name, call in calls.items()}, rounds=options.rounds, warmup=0)
        slow = {"delong_clustered": delong, "logloss_interval": loss_interval, f"bootstrap_{REPLICATES}": resampled}
        times |= interleave({name: partial(call, log) for name, call in slow.items()}, rounds=1, warmup=0)
        for name, timing in times.items():
            result.figure(f"{name}_s", timing.p50_ms / 1e3)
        for name in ("auc", "bucketed_auc", "gauc"):
            result.figure(f"{name}_peak_mib", peak_mib(calls[name], log))
        result.figure("bucketed_auc_bound", bucketed(log)[1])
        result.ratio("auc_vs_sklearn", times["sklearn"].p50_ms / times["auc"].p50_ms)
        result.ratio("gauc_vs_pandas", times["pandas"].p50_ms / times["gauc"].p50_ms)


if __name__ == "__main__":
    main()
