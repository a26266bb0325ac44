"""The verb `train` as a process, as people and schedulers run it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from ninerank.cli.main import main
from ninerank.training import sealed

COMMAND = (sys.executable, "-m", "ninerank", "train")
WAIT_S = 120


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=WAIT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(*arguments: str | Path) -> int:
    """Exit code of the verb in this process."""
    try:
        main(["train", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def recipe_path(tmp_path: Path, mapping: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(mapping | {"checkpoint": {"every_steps": 50}}))
    return path


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a checkpoint of that step or a later one is there."""
    deadline_s = time.monotonic() + WAIT_S
    while not any(int(path.name.removeprefix("step-")) >= step for path in out.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def final_weights(out: Path, step: int) -> dict[str, bytes]:
    files = sealed.verify(out / "checkpoints" / f"step-{step}").paths
    return {name: path.read_bytes() for name, path in files.items() if path.suffix == ".safetensors"}


def test_signals_save_a_kill_loses_little_and_resume_gives_the_same_bytes(recipe_path, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--set", "schedule.epochs=12", "--set", "schedule.early_stopping=null", "--set", "data.batch_size=32")
    done = run(recipe_path, "--out", whole, "--json", *options)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["steps"] == 264

    stopped_at = 0
    for number, arguments in ((signal.SIGINT, (recipe_path, *options)), (signal.SIGTERM, ("--resume",))):
        process = start(*arguments, "--out", parts)
        wait_for_step(parts, stopped_at + 5, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130, err
        assert f"go on with: ninerank train --resume --out {parts}" in err
        assert "Traceback" not in err
        saved = re.search(rf"stopped by {number.name}; saved {parts}/checkpoints/step-(\d+)\n", err)
        assert saved is not None, err
        assert stopped_at < int(saved[1]) < 264
        stopped_at = int(saved[1])
    process = start("--resume", "--out", parts)
    wait_for_step(parts, stopped_at + 5, process)
    process.kill()
    process.communicate(timeout=WAIT_S)
    assert not (parts / "metrics.json").exists()

    done = run("--resume", "--out", parts, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"] == metrics["test"]
    assert final_weights(parts, 264) == final_weights(whole, 264)


def test_a_table_for_people(recipe_path, tmp_path, capfd):
    train(recipe_path, "--out", tmp_path / "run", "--set", "schedule.epochs=1")
    out, err = capfd.readouterr()
    assert all(word in out for word in ("auc", "logloss", "valid", "test", "samples/s", str(tmp_path / "run")))
    assert "epoch 1: valid auc" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{recipe}", "--set", "schedule.epoch=1"], "schedule: unknown key 'epoch'; did you mean 'epochs'?"),
        (["{recipe}", "--set", "data.dir=/nowhere"], "data.dir: '/nowhere' is no directory"),
        (
            ["{recipe}", "--set", "data.dir=$NOT_SET_ANYWHERE"],
            "NOT_SET_ANYWHERE is not set; set it, or say where the data lie: --set data.dir=...",
        ),
        (["{recipe}", "--set", "spec.features.0.column=usr"], "column 'usr' is missing; did you mean 'user'?"),
        (["{recipe}", "--set", "spec.labels=[price]", "--set", "spec.features.5=null"], "spec"),
        (["{recipe}", "--set", "device=tpu"], "device 'tpu': is none of auto, cpu"),
        (["absent.yaml"], "absent.yaml: cannot be read"),
        ([], "no recipe: give a YAML file"),
        (["--resume"], "is no run directory, recipe.yaml is missing"),
        (["{recipe}", "--resume", "--overwrite"], "--overwrite and --resume exclude each other"),
    ],
)
def test_wrong_input_is_one_line(recipe_path, tmp_path, capfd, arguments, message):
    assert train(*(text.format(recipe=recipe_path) for text in arguments), "--out", tmp_path / "run") == 1
    out, err = capfd.readouterr()
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err
    assert out == ""
