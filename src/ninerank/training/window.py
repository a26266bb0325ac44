"""Figures of the steps since the last line of history: loss, AUC, samples a second.

Shape legend: B rows, T tasks.
"""

import math
import time
from collections import deque

import numpy as np
import torch
from torch import Tensor

from ninerank.errors import SpecError
from ninerank.features.batch import Batch
from ninerank.metrics import auc
from ninerank.training.processes import Processes

__all__ = ["Window"]

AUC_ROWS = 1 << 18


class Window:
    """Accumulates on the device and looks at numbers only when asked, so that steps need not wait for each other."""

    def __init__(self) -> None:
        self.steps = 0
        self.samples = 0
        self._loss: Tensor | None = None
        self._recent: deque[tuple[Tensor, Tensor]] = deque()
        self._recent_rows = 0
        self._started_s = time.monotonic()
        self._paused_s = 0.0

    def add(self, loss: Tensor, logits_BT: Tensor, batch: Batch) -> None:
        """One step's loss and logits; the AUC is of the first task and of the last `AUC_ROWS` rows."""
        assert batch.label_BT is not None
        rows = batch.num_real_rows
        self.steps += 1
        self.samples += rows
        self._loss = loss if self._loss is None else self._loss + loss
        self._recent.append((batch.label_BT[:rows, 0], logits_BT[:rows, 0]))
        self._recent_rows += rows
        while self._recent_rows - len(self._recent[0][0]) >= AUC_ROWS:
            self._recent_rows -= len(self._recent.popleft()[0])

    def together(self, processes: Processes) -> "Window":
        """The same steps of all processes: losses, of which each gave its share, added up; rows, for the AUC, in the first one alone."""
        if processes.world_size == 1 or self._loss is None:
            return self
        whole = Window()
        whole.steps, whole._started_s, whole._paused_s = self.steps, self._started_s, self._paused_s
        loss, samples = processes.sum(float(self._loss), self.samples)
        whole._loss, whole.samples = torch.tensor(loss, dtype=torch.float64), int(samples)
        whole._recent.extend((torch.from_numpy(label), torch.from_numpy(score)) for label, score in processes.gather(self._rows()))
        return whole

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        label_B = torch.cat([label for label, _ in self._recent]).cpu().numpy()
        return label_B, torch.cat([logit for _, logit in self._recent]).float().cpu().numpy()

    def exclude(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self._paused_s += seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started_s - self._paused_s

    def loss(self, step: int) -> float:
        """Mean loss of a step; raises SpecError if it is not finite, for then the weights are lost."""
        assert self._loss is not None
        mean = float(self._loss) / self.steps
        if not math.isfinite(mean):
            first = step - self.steps + 1
            advice = "lower optimizer.lr, or bound the gradients with schedule.clip_norm"
            raise SpecError(f"the loss became {mean} between steps {first} and {step}: training diverged; {advice}")
        return mean

    def auc(self) -> float | None:
        """AUC of recent rows, scored while they were trained on; None where they are all of one class, or another process has them."""
        if not self._recent:
            return None
        label_B, score_B = self._rows()
        value = auc(label_B, score_B.astype(np.float64))
        return value if math.isfinite(value) else None
