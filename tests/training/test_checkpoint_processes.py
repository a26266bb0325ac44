"""N processes save, M load: four processes that talk over gloo run every case once; each test looks at what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("checkpoint_processes.py")
PLANS = ("row", "column", "table", "grid")
CHANGES = ((1, 2), (2, 1), (4, 2), (2, 4), (2, 2))
WAIT_S = 150

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each process says of each case: `ok`, or how it failed."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "error", str(SCRIPT)]
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(4)]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stdout=log, stderr=subprocess.STDOUT, env=environment)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=WAIT_S) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    told = [(folder / f"{rank}.log").read_text()[-4000:] for rank in range(4)]
    assert codes == [0, -9, 0, 0], "\n".join(told)  # the second one is killed by the last case
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def check(outcomes: list[dict[str, str]], name: str, world_size: int) -> None:
    for rank in range(world_size):
        assert outcomes[rank].get(name) == "ok", outcomes[rank].get(name)


@pytest.mark.parametrize(("before", "after"), CHANGES)
@pytest.mark.parametrize("plan", PLANS)
def test_tables_and_optimizer_states_load_into_every_plan(outcomes, plan, before, after):
    check(outcomes, f"save {plan}-{before}", before)
    for other in PLANS:
        check(outcomes, f"load {plan}-{before} as {other}-{after}", after)


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_dynamic_tables_are_dealt_out_by_id(outcomes, before, after):
    check(outcomes, f"dynamic {before}-{after}", after)


@pytest.mark.parametrize("case", ["best", "full disk", "damage", "disagree"])
def test_an_error_of_one_is_an_error_of_all(outcomes, case):
    check(outcomes, case, 2)


def test_the_loss_of_a_process_while_both_write_keeps_the_checkpoint_before(outcomes):
    check(outcomes, "lost", 1)
    assert "lost" not in outcomes[1]
