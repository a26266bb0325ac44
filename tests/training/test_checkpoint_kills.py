"""kill -9 while a checkpoint is written in the background: the one before it is never lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("checkpoint_kills.py")


@pytest.mark.parametrize("moments", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_no_moment_loses_the_checkpoint_before(tmp_path, moments):
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path), str(moments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout)
    assert seen["moments"] == moments
    assert seen["cut_short"] >= moments // 5, "most kills came between saves: the moments say nothing"
