"""Whatever comes over the wire is answered or refused with the right status; the server neither falls, hangs nor grows.

Random bytes, sound messages with bytes changed, and sound protobuf with absurd contents: sizes, offsets, shapes, NaN, text that is
none. Most of them go straight to the front, on the event loop; a share goes over real gRPC. 200,000 are in the slow tests.
"""

import random
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pyarrow as pa
import pytest
from google.protobuf.message import Message

from ninerank.predictor.call import Call
from ninerank.predictor.client import build_request
from ninerank.predictor.eventloop import on_loop
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.predictor.status import refusal
from ninerank.predictor.wire import encode_column
from ninerank.proto.v1 import predictor_pb2 as pb

USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS = [{"item_id": "i1", "price": 1.5, "tags": ["t1"], "city": "rome"}, {"item_id": "i2", "price": None, "tags": [], "city": "oslo"}]
NAMES = ("user_id", "age", "hour", "history", "item_id", "tags", "price", "city", "", "prise", "x" * 300, "价格\n")
ODD_NUMBERS = (0, 1, 2, 3, 7, 255, 256, 500, 501, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
ODD_FLOATS = (float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, 0.0, 1.5)
REFUSALS = {"INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
GRPC_SHARE = 20


def sound() -> list[Message]:
    rows = [{**USER, **item} for item in ITEMS]
    scored = pb.ScoreRequest(num_rows=2)
    scored.features.extend(encode_column(name, pa.array([row[name] for row in rows])) for name in rows[0])
    asked = build_request(USER, ITEMS)
    asked.tasks.append("click")
    asked.explain_top, asked.priority, asked.session, asked.timeout_ms = 1, pb.PRIORITY_HIGH, "s", 60_000
    return [
        build_request(USER, ITEMS),
        build_request(USER, {"price": [1.0, 2.0, 3.0]}, ids=["i1", "i2", "x"]),
        build_request({"history": ["i1"] * 5}, {"tags": [["a", "é"], None, []], "item_id": ["i1", None, "i3"]}, top_k=2),
        asked,
        scored,
    ]


class Fuzz:
    """Draws messages; the same seed draws the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sound = [message.SerializeToString() for message in sound()]

    def draw(self) -> bytes:
        kind = self.random.randrange(10)
        if kind == 0:
            return self.random.randbytes(self.random.randrange(200))
        if kind <= 5:
            return self.changed(self.random.choice(self.sound))
        data = self.absurd().SerializeToString()
        return self.changed(data) if kind == 9 else data

    def changed(self, data: bytes) -> bytes:
        rng, new = self.random, bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 3])):
            place, way = rng.randrange(len(new) + 1), rng.randrange(12)
            if way == 0:
                new[place:place] = rng.randbytes(rng.randrange(1, 5))
            elif way == 1:
                del new[place : place + rng.randrange(1, 9)]
            elif way == 2:
                new[place:place] = new[place : place + rng.randrange(1, 40)]
            elif place < len(new):
                new[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        return bytes(new[: rng.choice([len(new)] * 5 + [rng.randrange(len(new) + 1)])])

    def absurd(self) -> Message:
        """A sound message in which a few things are out of all measure."""
        rng = self.random
        if rng.random() < 0.3:
            score = pb.ScoreRequest.FromString(self.sound[-1])
            for _ in range(rng.randrange(1, 4)):
                self.spoil(score.features)
            if rng.random() < 0.3:
                score.num_rows = rng.choice(ODD_NUMBERS)
            return score
        rank = pb.RankRequest.FromString(rng.choice(self.sound[:-1]))
        for _ in range(rng.randrange(1, 4)):
            self.spoil(rng.choice([rank.user, rank.item_features]))
        way = rng.randrange(9)
        if way == 0:
            rank.num_candidates = rng.choice(ODD_NUMBERS)
        elif way == 1:
            rank.top_k, rank.explain_top = rng.choice(ODD_NUMBERS), rng.choice(ODD_NUMBERS)
        elif way == 2:
            rank.timeout_ms = rng.choice(ODD_NUMBERS)
        elif way == 3:
            rank.request_id = rng.choice(["", " ", "é", "x" * 1_000, "ok-1"])
        elif way == 4:
            rank.priority = rng.choice([-1, 3, 99, 2**31 - 1, 1])
        elif way == 5:
            rank.tasks.extend(rng.choice(["click", "buy", "", "click"]) for _ in range(rng.randrange(50)))
        elif way == 6:
            rank.candidate_ids.CopyFrom(self.column())
        elif way == 7:
            rank.propensities.extend(rng.choice([*ODD_FLOATS, 0.5, 1.0]) for _ in range(rng.randrange(4)))
        else:
            rank.model_name, rank.model_version = rng.choice(["", "small", "x" * 10_000]), rng.choice(["", "7", "\x00"])
        return rank

    def spoil(self, columns: "list[pb.Column]") -> None:
        rng = self.random
        if columns and rng.random() < 0.7:
            columns[rng.randrange(len(columns))].CopyFrom(self.column())
        else:
            columns.extend([self.column()] * rng.choice([1, 1, 2, 100]))

    def column(self) -> pb.Column:
        rng = self.random
        column = pb.Column(name=rng.choice(NAMES))
        count = rng.randrange(6)
        kind = rng.randrange(5)
        if kind == 0:
            column.int64_values = struct.pack(f"<{count}q", *(rng.choice([0, -1, 2**63 - 1, -(2**63)]) for _ in range(count)))
        elif kind == 1:
            column.float64_values = struct.pack(f"<{count}d", *(rng.choice(ODD_FLOATS) for _ in range(count)))
        elif kind == 2:
            column.float32_values = rng.randbytes(rng.choice([4 * count, rng.randrange(20)]))
        elif kind == 3:
            column.string_values.data = rng.choice([b"", b"abc", b"\xff\xfe", "é".encode(), rng.randbytes(6)])
            column.string_values.offsets = self.offsets()
        if rng.random() < 0.4:
            column.list_offsets = self.offsets()
        if rng.random() < 0.3:
            column.validity = rng.randbytes(rng.randrange(3))
        return column

    def offsets(self) -> bytes:
        rng, count = self.random, self.random.randrange(5)
        if rng.random() < 0.5:
            return struct.pack(f"<{count}I", *(rng.choice(ODD_NUMBERS) for _ in range(count)))
        return struct.pack(f"<{count}I", *sorted(rng.randrange(4) for _ in range(count)))


@pytest.fixture(scope="module")
def server(bundle_dir: Path) -> Iterator[tuple[PredictorServer, str]]:
    own = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", max_candidates=500, max_message_bytes=1 << 20))
    yield own, f"127.0.0.1:{own.start().port}"
    own.stop(0)


def check(answer: bytes, kind: type[Message]) -> None:
    response = kind.FromString(answer)
    assert isinstance(response, pb.RankResponse | pb.ScoreResponse)
    scores = response.scores if isinstance(response, pb.RankResponse) else [s for task in response.tasks for s in task.scores]
    assert all(0 <= score <= 1 for score in scores)


async def straight(server: PredictorServer, messages: list[bytes]) -> Counter[str]:
    """To the front, each message as a rank call and as a score call."""
    statuses: Counter[str] = Counter()
    for data in messages:
        for method, kind in ((server.front.rank, pb.RankResponse), (server.front.score, pb.ScoreResponse)):
            call = Call(time.perf_counter_ns(), time.perf_counter_ns() + 60 * 10**9, "fuzz")
            try:
                answer = await method(data, call)
            except Exception as error:  # noqa: BLE001 - what it is counts
                statuses[refusal(error, call.request_id).status] += 1
            else:
                check(answer, kind)
                statuses["OK"] += 1
    return statuses


def over_grpc(target: str, messages: list[bytes]) -> Counter[str]:
    statuses: Counter[str] = Counter()
    with grpc.insecure_channel(target) as channel:
        rank = channel.unary_unary("/ninerank.v1.Predictor/Rank")
        calls = [rank.future(data, timeout=120) for data in messages]
        for call in calls:
            statuses[call.code().name] += 1
            if call.code() is grpc.StatusCode.OK:
                check(call.result(), pb.RankResponse)
    return statuses


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def fuzz(server: PredictorServer, target: str, count: int, seed: int) -> None:
    drawn, statuses, settled = Fuzz(seed), Counter[str](), 0
    block = max(count // 20, 1)
    for number in range(20):
        messages = [drawn.draw() for _ in range(block)]
        statuses += on_loop(straight(server, messages))
        share = messages[::GRPC_SHARE]
        for start in range(0, len(share), 100):  # fewer than may wait
            statuses += over_grpc(target, share[start : start + 100])
        if number == 4:
            settled = resident_bytes()
    assert statuses.keys() <= {"OK", *REFUSALS}, statuses
    assert statuses["OK"] > count // 50
    print(statuses, (resident_bytes() - settled) >> 20, "MiB")
    assert statuses["INVALID_ARGUMENT"] > count // 2
    assert resident_bytes() - settled < 64 << 20
    stats = server.queue.stats()
    assert (stats.waiting, stats.running) == (0, 0)
    assert [state.leases for state in server.host.models()] == [0]
    with grpc.insecure_channel(target) as channel:
        answer = channel.unary_unary("/ninerank.v1.Predictor/Rank")(drawn.sound[0], timeout=60)
    check(answer, pb.RankResponse)


def test_some_thousand_messages_of_every_kind(server: tuple[PredictorServer, str]) -> None:
    fuzz(*server, count=3_000, seed=1)


@pytest.mark.slow
def test_two_hundred_thousand_messages(server: tuple[PredictorServer, str]) -> None:
    fuzz(*server, count=200_000, seed=2)
