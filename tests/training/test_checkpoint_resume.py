"""A run that goes on with another number of processes and another sharding, again and again, ends where one process alone ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ninerank.training.run import load_run
from ninerank.training.trainer import Trainer

SCRIPT = Path(__file__).with_name("resume_job.py")
WAIT_S = 240


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [str(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adam"])
def test_four_two_one_two_processes_end_like_one(make_recipe, tmp_path, kind):
    pytest.importorskip("torchrec")
    overrides = ["model.mlp.batch_norm=false", "model.mlp.dropout=0", f"optimizer.sparse={{kind: {kind}, lr: 0.02}}"]
    recipe = make_recipe("embedding.mode=sparse", "schedule.early_stopping=null", "sharding.timeout_s=120", *overrides)
    whole = Trainer(recipe, tmp_path / "whole").fit()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = [(tmp_path / f"{rank}.log").open("w") for rank in range(4)]
    ports = free_ports(5)
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(tmp_path), *ports], env=environment, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=WAIT_S) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    assert codes == [0, 0, 0, 0], "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(4))
    parts = load_run(tmp_path / "parts")
    assert parts.metrics["steps"] == whole["steps"] == 24
    assert parts.metrics["test"]["logloss"] == pytest.approx(whole["test"]["logloss"], rel=1e-5)
    alone = load_run(tmp_path / "whole").model.state_dict()
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
