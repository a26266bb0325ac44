"""Worker processes of one server share one memory of features, and a replacement maps that of those who live."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.predictor.client import PredictorClient
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.supervisor import Supervisor


@pytest.mark.distributed
@pytest.mark.slow
def test_workers_share_the_memory_of_features(bundle_dir: Path, log_rows: Callable[..., pa.RecordBatch], tmp_path: Path) -> None:
    rows = log_rows(40, seed=77)
    items = {name: rows.column(name) for name in ("tags", "price", "city")}
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(40)], **items}), tmp_path / "items.parquet")
    supervisor = Supervisor(
        bundle_dir, ServeConfig(port=0, device="cpu", processes=2, items=tmp_path / "items.parquet", cache_bytes=1 << 22)
    )

    def memories() -> set[int]:
        ready = [worker.ready for worker in supervisor._workers.values()]
        return {0 if one is None else Path(one.shared["item"]).stat().st_ino for one in ready}

    ready = supervisor.start()
    try:
        assert list(ready.caches) == ["40 items by item_id"]
        first = memories()
        assert len(first) == 1
        with PredictorClient(f"127.0.0.1:{ready.port}", connections=8, timeout_ms=60_000) as client:
            user = {"user_id": "u1"}
            wanted = client.rank(user, ids=["i1", "nobody"])
            assert wanted.defaults_used.unknown_candidates == (1,)
            os.kill(supervisor.pids()[0], signal.SIGKILL)  # the one that made the memory
            due = time.monotonic() + 120
            while not supervisor.replaced or len(supervisor.call("queue")) < 2:
                assert time.monotonic() < due, "no replacement serves"
                time.sleep(0.1)
            assert memories() == first
            for _ in range(16):
                again = client.rank(user, ids=["i1", "nobody"])
                assert again.scores.tolist() == wanted.scores.tolist()
                assert again.defaults_used == wanted.defaults_used
    finally:
        supervisor.stop()
