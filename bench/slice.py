"""The slice, end to end: training samples/s, and requests/s and latency of the server over gRPC.

Training: DeepFM, dim 16, MLP 400-400-400, on the synthetic log, by `ninerank train` itself (transform cached after the first epoch).
Serving: the exported bundle behind `ninerank serve`, the client on the same machine; every request is one user and N candidates by
id, looked up in the server's feature cache. Scores are checked against the engine in process before anything is timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from harness import Result, Timing

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000, help="rows of the log")
    parser.add_argument("--candidates", type=int, default=256, help="candidates of a request")
    parser.add_argument("--requests", type=int, default=1_000, help="requests of each client count, per round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; client counts take turns within each")
    options = parser.parse_args()
    shapes = {"rows": options.rows, "batch": 4096, "dim": 16, "mlp": "400-400-400", "candidates": options.candidates}
    with tempfile.TemporaryDirectory(prefix="ninerank-slice-") as folder, Result("slice", shapes=shapes) as result:
        out = Path(folder)
        ninerank("features", "synthetic", out / "log", "--rows", options.rows)
        recipe = ROOT / "examples" / "synthetic_deepfm.yaml"
        settings = [f"data.dir={out / 'log'}", "schedule.epochs=2", "model.embedding_dim=16", "model.mlp.hidden=[400,400,400]"]
        ninerank("train", recipe, "--out", out / "run", *(word for setting in settings for word in ("--set", setting)))
        metrics = json.loads((out / "run" / "metrics.json").read_text())
        result.figure("train_samples_per_s", metrics["samples_per_s"])
        ninerank("export", out / "run", "--out", out / "bundle")
        for clients, timing, rate in serve(out, options.candidates, options.requests, options.rounds):
            result.figure(f"serve_requests_per_s_c{clients}", rate)
            result.figure(f"serve_p50_ms_c{clients}", timing.p50_ms)
            result.figure(f"serve_p99_ms_c{clients}", timing.p99_ms)


def serve(out: Path, candidates: int, requests: int, rounds: int) -> list[tuple[int, Timing, float]]:
    """(clients, latency of a request, requests/s) of a closed loop."""
    from ninerank.predictor.client import PredictorClient

    bodies = request_bodies(out, candidates)
    command = [sys.executable, "-m", "ninerank", "serve", out / "bundle", "--port", "0", "--items", out / "log" / "items.parquet"]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        target = next(line for line in server.stdout if line.startswith("serving ")).rsplit(" at ", 1)[1].strip()
        with PredictorClient(target) as client:
            check(client, out / "bundle", bodies[0], out / "log" / "items.parquet")
            seconds: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
            elapsed = dict.fromkeys(CLIENTS, 0.0)
            for body in bodies[:50]:
                client.rank(**body)
            for _ in range(rounds):
                for clients in CLIENTS:
                    started = time.perf_counter()
                    seconds[clients] += closed_loop(client, bodies, clients, requests)
                    elapsed[clients] += time.perf_counter() - started
    finally:
        server.terminate()
        server.wait(30)
    return [(clients, Timing.of(seconds[clients]), len(seconds[clients]) / elapsed[clients]) for clients in CLIENTS]


def closed_loop(client, bodies, clients: int, requests: int) -> list[float]:  # type: ignore[no-untyped-def]
    """Latencies in seconds of `requests` calls, `clients` of them under way at any time."""
    seconds: list[list[float]] = [[] for _ in range(clients)]

    def work(own: int) -> None:
        for i in range(own, requests, clients):
            start = time.perf_counter()
            client.rank(**bodies[i % len(bodies)])
            seconds[own].append(time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [second for own in seconds for second in own]


def request_bodies(out: Path, candidates: int) -> list[dict[str, Any]]:
    """Requests made of the test split's users and of items drawn with the log's own skew."""
    from ninerank.features.spec import FeatureSpec

    spec = FeatureSpec.load(out / "run" / "spec.json")
    rows = pq.read_table(out / "log" / "test.parquet", columns=list(spec.columns("request")))
    key = spec.feature(spec.single_keys("item")[0]).column
    items = pq.read_table(out / "log" / "test.parquet", columns=[key]).column(0).combine_chunks()
    random = np.random.default_rng(0)
    users = rows.take(random.integers(0, rows.num_rows, 200)).to_pylist()
    return [{"user": user, "ids": items.take(random.integers(0, len(items), candidates))} for user in users]


def check(client, bundle: Path, body, items: Path) -> None:  # type: ignore[no-untyped-def]
    """The server's scores are the engine's."""
    import pyarrow as pa

    from ninerank.predictor.engine import Engine

    engine = Engine.load(bundle, device="cpu")
    table = pq.read_table(items)
    key = engine.spec.feature(engine.spec.single_keys("item")[0]).column
    places = {value: i for i, value in enumerate(table.column(key).to_pylist())}
    candidates = table.take([places[value] for value in body["ids"].to_pylist()])
    joined = {name: candidates.column(name).combine_chunks() for name in engine.spec.columns("item")}
    for name in engine.spec.columns("request"):
        joined[name] = pa.array([body["user"][name]] * candidates.num_rows)
    expected = engine.score(pa.RecordBatch.from_pydict(joined))[:, 0]
    largest = float(np.abs(client.rank(**body).scores - expected).max())
    if largest > 1e-6:
        raise SystemExit(f"the server's scores differ from the engine's by {largest:.2e}; nothing was timed")


def ninerank(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ninerank", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
