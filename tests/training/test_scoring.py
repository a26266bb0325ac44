"""Metrics of scored batches."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ninerank.features.batch import Batch
from ninerank.training.scoring import Scores


@pytest.mark.parametrize("weighted", [False, True])
def test_float32_scores_give_the_metrics_of_the_same_scores_in_float64(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, labels = 20_000, ("click", "buy")
    logit = torch.randn(rows, 2, generator=generator) * 3 - 4
    logit[:50], logit[50:100] = 40.0, -120.0  # saturated: exactly 1 and 0
    score_BT = torch.sigmoid(logit)
    columns: dict[str, Any] = {
        "label_BT": (torch.rand(rows, 2, generator=generator) < score_BT).float(),
        "weight_B": torch.rand(rows, generator=generator) if weighted else None,
        "group_B": torch.randint(0, 900, (rows,), generator=generator),
    }
    found = []
    for scores_BT in (score_BT, score_BT.double()):
        scores = Scores(labels, grouped=True)
        for start in range(0, rows, 3_000):
            part = {name: None if column is None else column[start : start + 3_000] for name, column in columns.items()}
            real = len(part["label_BT"])
            scores.update(cast(Batch, SimpleNamespace(**part, num_rows=real, num_real_rows=real)), scores_BT[start : start + 3_000])
        found.append(scores.value())
    assert found[0].keys() == found[1].keys() >= {"auc", "gauc", "logloss", "pcoc", "click.auc"}
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-9), name
