"""Servers under load: one user and 256 candidates a request, 20 + 19 fields of dim 16, a million rows, MLP 400-400-400, bf16.

    ours            `ninerank serve`, two processes, candidates' features inline
    ours_ids        the same server, candidates by id, features in its memory
    mosec           the same model as frozen TorchScript behind mosec, two workers (`make bench-peers` makes its environment)

The client runs on the same cores, as asyncio in one process, and sends requests that were made beforehand. Scores are checked first: within
1e-3 of float32. Rounds go in turns, with 1 and with 8 requests under way; the figures are medians of the rounds.

    python bench/serving.py [--rounds 3] [--seconds 4] [--peers .venv-peers]
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from harness import ROOT, Result
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.features.spec import FeatureSpec, Hashed, IdFeature
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.client import build_request
from ninerank.predictor.engine import Engine
from ninerank.predictor.load import LoadConfig, run_load
from ninerank.proto.v1 import predictor_pb2 as pb
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model

USERS, ITEMS, CANDIDATES, DIM, BUCKETS, CATALOGUE = 20, 19, 256, 16, 25_000, 5_000
HIDDEN = [400, 400, 400]
NUM_REQUESTS = 64
START_S = 120.0
Measure = Callable[[int, float], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each player (default 3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default 4)")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="environment that has mosec")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"), help="of ours (default bf16)")
    options = parser.parse_args()
    shapes = {"candidates": CANDIDATES, "fields": USERS + ITEMS, "dim": DIM, "mlp": "400-400-400", "rows": BUCKETS * (USERS + ITEMS)}
    with tempfile.TemporaryDirectory() as folder, Result("serving", shapes) as result, ExitStack() as servers:
        bench = Bench(Path(folder))
        target = servers.enter_context(bench.ours(options.precision))
        players: dict[str, Measure] = {"ours": bench.grpc(target, bench.inline), "ours_ids": bench.grpc(target, bench.by_id)}
        bench.check(target)
        mosec = options.peers / "bin" / "python"
        if mosec.exists():
            port = servers.enter_context(bench.mosec(mosec))
            players["mosec"] = bench.http(port)
        else:
            print(f"mosec is left out: {mosec} is not there (make bench-peers)")
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for turn in range(options.rounds + 1):
            for concurrency in (1, 8):
                for name in list(players)[turn % len(players) :] + list(players)[: turn % len(players)]:
                    measured = players[name](concurrency, options.seconds if turn else 1.0)
                    if turn:  # the first round warms up
                        found.setdefault((name, concurrency), []).append(measured)
        rates = {key: statistics.median(rate for rate, _ in values) for key, values in found.items()}
        p50s = {key: statistics.median(p50 for _, p50 in values) for key, values in found.items()}
        for (name, concurrency), rate in rates.items():
            result.figure(f"{name}_requests_per_s_c{concurrency}", rate)
            result.figure(f"{name}_p50_ms_c{concurrency}", p50s[name, concurrency])
        result.figure("requests_per_s_c8", rates["ours", 8])
        result.figure("p50_ms_c1", p50s["ours", 1])
        if ("mosec", 8) in rates:
            result.ratio("vs_mosec_c8", rates["ours", 8] / rates["mosec", 8])
            result.ratio("vs_mosec_c1", rates["ours", 1] / rates["mosec", 1])


class Split(nn.Module):
    """The same model in plain torch, the user's half of the first layer computed once, hidden layers in bfloat16."""

    def __init__(self, rows_VD: Tensor, first_row_F: Tensor, layers: list[tuple[Tensor, Tensor]], precision: torch.dtype) -> None:
        super().__init__()
        self.rows_VD, self.first_row_F = nn.Parameter(rows_VD, requires_grad=False), nn.Parameter(first_row_F, requires_grad=False)
        width = USERS * DIM
        first, bias = layers[0]
        self.user = nn.Linear(width, len(bias)).to(precision)
        self.item = nn.Linear(ITEMS * DIM, len(bias), bias=False).to(precision)
        hidden = [nn.Linear(w.shape[1], w.shape[0]).to(precision) for w, _ in layers[1:]]
        self.rest = nn.Sequential(*[part for layer in hidden for part in (layer, nn.ReLU())][:-1])
        with torch.no_grad():
            self.user.weight.copy_(first[:, :width])
            self.user.bias.copy_(bias)
            self.item.weight.copy_(first[:, width:])
            for own, (weight, b) in zip(hidden, layers[1:], strict=True):
                own.weight.copy_(weight)
                own.bias.copy_(b)
        self.precision = precision

    def forward(self, user_F: Tensor, item_NF: Tensor) -> Tensor:
        user = self.rows_VD[user_F + self.first_row_F[: user_F.shape[0]]].flatten().to(self.precision)
        item = self.rows_VD[item_NF + self.first_row_F[user_F.shape[0] :]].flatten(1).to(self.precision)
        hidden = torch.relu(self.item(item) + self.user(user))
        scores: Tensor = torch.sigmoid(self.rest(hidden).float()).flatten()
        return scores


class Bench:
    """The model in both forms, requests for it, and the servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        hashed = Hashed(num_buckets=BUCKETS)
        features = [IdFeature(name=f"u{i}", role="user", dtype="int64", encoding=hashed) for i in range(USERS)]
        features += [IdFeature(name=f"i{i}", role="item", dtype="int64", encoding=hashed) for i in range(ITEMS)]
        spec = FeatureSpec(labels=("click",), features=tuple(features))
        config = parse_model({"name": "dnn", "embedding_dim": DIM, "mlp": {"hidden": HIDDEN}})
        self.model = build_model(config, spec, EmbeddingConfig(init_std=0.3), seed=0).eval()
        rng = np.random.default_rng(0)
        catalogue = {f"i{i}": rng.integers(0, 1 << 40, CATALOGUE) for i in range(ITEMS)}
        golden = {f"u{i}": rng.integers(0, 1 << 40, 64) for i in range(USERS)} | {name: values[:64] for name, values in catalogue.items()}
        export_bundle(self.model, spec, pa.record_batch(golden), folder / "bundle", model_name="dnn", version="1")
        pq.write_table(pa.table({"item_id": np.arange(CATALOGUE), **catalogue}), folder / "items.parquet")
        self.inline, self.by_id, self.ids = [], [], []
        engine = Engine.load(folder / "bundle", "cpu")
        self.engine = engine
        for _ in range(NUM_REQUESTS):
            chosen = rng.integers(0, CATALOGUE, CANDIDATES)
            user = {f"u{i}": int(rng.integers(0, 1 << 40)) for i in range(USERS)}
            items = {name: values[chosen] for name, values in catalogue.items()}
            self.inline.append(build_request(user, items).SerializeToString())
            self.by_id.append(build_request(user, ids=chosen).SerializeToString())
            batch = engine._transform.request(pa.record_batch({k: [v] for k, v in user.items()}), pa.record_batch(items))
            item_NF = batch.item.single.values.view(ITEMS, CANDIDATES).T
            self.ids.append(np.concatenate([batch.request.single.values.numpy(), item_NF.reshape(-1).numpy()]).tobytes())

    @contextmanager
    def ours(self, precision: str) -> Iterator[str]:
        command = [sys.executable, "-m", "ninerank", "-q", "serve", str(self.folder / "bundle"), "--port", "0", "--processes", "2"]
        command += ["--precision", precision, "--items", str(self.folder / "items.parquet"), "--item-key", "item_id"]
        with _process(command) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("serving "):
                    yield line.rsplit(" at ", 1)[1].strip()
                    return
            raise SystemExit("the server ended before it answered")

    def check(self, target: str) -> None:
        """Scores of the server against the model in float32, by both ways of asking."""
        import grpc

        with grpc.insecure_channel(target) as channel:
            call = channel.unary_unary("/ninerank.v1.Predictor/Rank", None, None)
            for requests in (self.inline, self.by_id):
                for number in (0, 1, 2):
                    scores = np.array(pb.RankResponse.FromString(call(requests[number])).scores)
                    self._compare(scores, number)

    def _compare(self, scores_N: "np.ndarray[Any, Any]", number: int) -> None:
        difference = float(np.abs(scores_N - self.expected(number)).max())
        assert difference <= 1e-3, f"scores differ by {difference}"

    def expected(self, number: int) -> "np.ndarray[Any, Any]":
        request = pb.RankRequest.FromString(self.inline[number])
        user = pa.record_batch({c.name: np.frombuffer(c.int64_values, np.int64) for c in request.user})
        items = pa.record_batch({c.name: np.frombuffer(c.int64_values, np.int64) for c in request.item_features})
        scores: np.ndarray[Any, Any] = self.engine.rank(self.engine.schema.rank_input(user, items)).scores_NT[:, 0]
        return scores

    def grpc(self, target: str, requests: list[bytes]) -> Measure:
        def measure(concurrency: int, seconds: float) -> tuple[float, float]:
            config = LoadConfig(concurrency=concurrency, seconds=seconds, warmup_s=0.3, channels=min(concurrency, 4))
            found = run_load(target, requests, config)
            assert set(found.statuses) == {"OK"}, found.statuses
            return found.requests_per_s, found.percentile_ms(50)

        return measure

    @contextmanager
    def mosec(self, python: Path) -> Iterator[int]:
        state = self.model.state_dict()
        weights = [value for name, value in state.items() if name.startswith("tower.") and name.endswith("weight") and value.dim() == 2]
        biases = [value for name, value in state.items() if name.startswith("tower.") and name.endswith("bias")]
        group = dict(self.model.embedding.named_groups())["deep"]
        first_row_F = torch.tensor([rows.start for _, rows in self.model.embedding.layout.items()])
        split = Split(group.storage.detach(), first_row_F, list(zip(weights, biases, strict=True)), torch.bfloat16).eval()
        ids = torch.from_numpy(np.frombuffer(self.ids[0], np.int64).copy())
        example = (ids[:USERS], ids[USERS:].view(CANDIDATES, ITEMS))
        with torch.inference_mode():
            traced: Any = torch.jit.trace(split, example)  # type: ignore[no-untyped-call]
            frozen = torch.jit.freeze(traced)
            self._compare(frozen(*example).numpy(), 0)
        path = self.folder / "model.pt"
        torch.jit.save(frozen, path)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        command = [str(python), str(ROOT / "bench" / "peers_mosec.py"), str(path), "--port", str(port), "--address", "127.0.0.1"]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with _process(command, {**environment, "OMP_NUM_THREADS": "1"}, quiet=True):
            due = time.monotonic() + START_S
            while time.monotonic() < due:
                try:
                    answer = asyncio.run(_post_once(port, self.ids[0]))
                except OSError:
                    time.sleep(0.2)
                    continue
                if len(answer) == 4 * CANDIDATES:
                    self._compare(np.frombuffer(answer, np.float32), 0)
                    yield port
                    return
                time.sleep(0.2)
            raise SystemExit("mosec did not answer")

    def http(self, port: int) -> Measure:
        def measure(concurrency: int, seconds: float) -> tuple[float, float]:
            return asyncio.run(_closed_loop(port, self.ids, concurrency, seconds))

        return measure


@contextmanager
def _process(command: list[str], environment: dict[str, str] | None = None, *, quiet: bool = False) -> Iterator["subprocess.Popen[str]"]:
    said = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, stdout=said if quiet else subprocess.PIPE, stderr=said, text=True, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> bytes:
    writer.write(b"POST /inference HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    answer = await reader.readexactly(length)
    if not head.startswith(b"HTTP/1.1 200"):
        return b""
    return answer


async def _post_once(port: int, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await _post(reader, writer, body)
    finally:
        writer.close()


async def _closed_loop(port: int, bodies: list[bytes], concurrency: int, seconds: float) -> tuple[float, float]:
    """Answers a second and median milliseconds."""
    latencies: list[float] = []
    start = time.perf_counter() + 0.3
    end = start + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while (now := time.perf_counter()) < end:
            answer = await _post(reader, writer, bodies[turn % len(bodies)])
            assert len(answer) == 4 * CANDIDATES
            turn += 1
            if now >= start:
                latencies.append(time.perf_counter() - now)
        writer.close()

    await asyncio.gather(*(client(n) for n in range(concurrency)))
    return len(latencies) / seconds, float(np.median(latencies) * 1e3)


if __name__ == "__main__":
    main()
