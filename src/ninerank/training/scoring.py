"""Scores of a model over batches, and the metrics of those scores.

Shape legend: B rows, T tasks.
"""

import math
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch

from ninerank.errors import DataError, SpecError
from ninerank.features.batch import Batch
from ninerank.metrics import AUC, GAUC, PCOC, LogLoss
from ninerank.towers.model import RankingModel
from ninerank.training.processes import Processes

__all__ = ["Scores", "measure"]

ALONE = Processes()


class Scores:
    """Accumulates labels and scores of one split; per task AUC, GAUC (with groups), log loss and PCOC."""

    def __init__(self, labels: tuple[str, ...], *, grouped: bool) -> None:
        self.labels = labels
        self.grouped = grouped
        self._metrics: list[dict[str, Any]] = [
            {"auc": AUC(), "logloss": LogLoss(), "pcoc": PCOC(), **({"gauc": GAUC()} if grouped else {})} for _ in labels
        ]
        self.num_rows = 0
        self.positives = [0.0] * len(labels)

    def update(self, batch: Batch, score_BT: torch.Tensor) -> None:
        """Add rows; `batch` carries labels, and weights and groups if the spec has them. Scores: float32 or float64."""
        if batch.label_BT is None:
            raise DataError(f"a batch of {batch.num_rows} rows has no labels, so it cannot be evaluated")
        rows = batch.num_real_rows
        label_BT = batch.label_BT[:rows].cpu().numpy()
        score = score_BT[:rows].detach().cpu().numpy()
        weight = None if batch.weight_B is None else batch.weight_B[:rows].cpu().numpy()
        self.num_rows += rows
        for task, metrics in enumerate(self._metrics):
            self.positives[task] += float(label_BT[:, task].sum())
            for name, metric in metrics.items():
                if name != "gauc":
                    metric.update(label_BT[:, task], score[:, task], weight)
                elif batch.group_B is not None:
                    metric.update(label_BT[:, task], score[:, task], weight, batch.group_B[:rows].cpu().numpy())

    def merge(self, other: "Scores") -> "Scores":
        """Take the rows of another process too."""
        self.num_rows += other.num_rows
        self.positives = [own + theirs for own, theirs in zip(self.positives, other.positives, strict=True)]
        for own_metrics, their_metrics in zip(self._metrics, other._metrics, strict=True):
            for name, metric in own_metrics.items():
                metric.merge(their_metrics[name])
        return self

    def value(self) -> dict[str, float | None]:
        """Metrics by name; with several tasks `<label>.<name>` beside the mean over tasks under `<name>`. Undefined is None."""
        values = [{name: _number(metric.value()) for name, metric in metrics.items()} for metrics in self._metrics]
        for task, own in enumerate(values):
            own["positive_rate"] = self.positives[task] / max(1, self.num_rows)
        found: dict[str, float | None] = {}
        for name in values[0]:
            known = [own[name] for own in values]
            found[name] = None if None in known else math.fsum(x for x in known if x is not None) / len(known)
        if len(values) > 1:
            found.update({f"{label}.{name}": own[name] for label, own in zip(self.labels, values, strict=True) for name in own})
        return {**found, "num_rows": self.num_rows}


@torch.no_grad()
def measure(
    model: RankingModel,
    batches: Iterable[Batch],
    labels: tuple[str, ...],
    *,
    device: torch.device,
    processes: Processes = ALONE,
    on_rows: Callable[[int], None] = lambda _: None,
) -> dict[str, float | None]:
    """Metrics of `model`, in evaluation mode and float32, over the `batches` of all processes; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    scores: Scores | None = None
    try:
        for host_batch in batches:
            batch = model.embedding.prepare(host_batch).to(device)
            if scores is None:
                scores = Scores(labels, grouped=batch.group_B is not None)
            score_BT = torch.sigmoid(model(batch).float())
            if not bool(score_BT.isfinite().all()):
                raise SpecError("the model's scores are not finite: training diverged; lower optimizer.lr, or set schedule.clip_norm")
            scores.update(host_batch, score_BT)
            on_rows(batch.num_rows)
    finally:
        model.train(was_training)
    if scores is None:
        raise DataError("there are no rows to evaluate on")
    everyone = processes.gather(scores)
    return processes.from_first(reduce(Scores.merge, everyone).value() if everyone else {})


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
