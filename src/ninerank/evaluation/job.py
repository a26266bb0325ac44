"""A whole replay as plain data, so that any process can do its share: open log, model, labels and snapshots, replay, merge."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ninerank.errors import DataError, nearest
from ninerank.evaluation.joined import Labels
from ninerank.evaluation.keptscores import KeptScores
from ninerank.evaluation.mapmerge import Where, map_parts
from ninerank.evaluation.replay import Replay, Unlabelled, replay
from ninerank.evaluation.replayer import BundleReplayer, EndpointReplayer, Replayer
from ninerank.evaluation.schedule import Schedule, paced
from ninerank.evaluation.skew import SideSnapshot, Skew
from ninerank.evaluation.snapshot import Snapshot

if TYPE_CHECKING:
    from ninerank.features.spec import Side

__all__ = ["ReplayJob", "SnapshotFile", "run_job"]


@dataclass(frozen=True)
class SnapshotFile:
    """A table of versions of users or items. key: its column of ids, by which the request's column of that name, or candidate ids, are
    looked up. time: see Snapshot.
    """

    side: "Side"
    path: Path
    key: str
    time: str | None = None


@dataclass(frozen=True)
class ReplayJob:
    """What to replay, by whom, and what to measure. Exactly one of bundle and target. work: where to keep scores, to go on later."""

    log: Path
    bundle: Path | None = None
    target: str | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    timeout_ms: int = 5000
    labels: Path | None = None
    unlabelled: Unlabelled = "skip"
    tolerance: float = 1e-6
    snapshots: tuple[SnapshotFile, ...] = ()
    schedule: Schedule = field(default_factory=Schedule)
    top_k: int = 10
    max_top_flips: float | None = None
    work: Path | None = None
    shard: tuple[int, int] = (0, 1)


def run_job(job: ReplayJob, *, processes: int = 1, where: Where = "local", on_requests: Callable[[int], None] = lambda _: None) -> Replay:
    """Replay, in several processes or on Ray if asked, each of which takes a share of the log. Raises what its parts raise."""
    if processes == 1 and where == "local":
        return _share(job, on_requests)
    parts = [replace(job, shard=(k, processes)) for k in range(processes)]
    found: list[Replay] = []
    for _, own in map_parts(_share, parts, processes=processes, where=where):
        found.append(own)
        on_requests(own.parity.num_requests)
    whole = reduce(Replay.merge, found)
    whole.check()
    return whole


def _share(job: ReplayJob, on_requests: Callable[[int], None] = lambda _: None) -> Replay:
    import torch

    # As the server: requests are small, and threads that wait for each other cost more than they bring.
    torch.set_num_threads(1)
    from ninerank.predictor.requestlog import read_log

    with _replayer(job) as replayer:
        return replay(
            paced(read_log(job.log, job.shard), job.schedule),
            replayer,
            log=str(job.log),
            labels=None if job.labels is None else Labels(job.labels, replayer.tasks),
            unlabelled=job.unlabelled,
            tolerance=job.tolerance,
            skew=_skew(job, replayer) if job.snapshots else None,
            top_k=job.top_k,
            max_top_flips=job.max_top_flips,
            concurrency=job.schedule.concurrency,
            shard=job.shard,
            on_requests=on_requests,
        )


def _replayer(job: ReplayJob) -> Replayer:
    if (job.bundle is None) == (job.target is None):
        raise DataError("a replay is by a bundle or by a target, exactly one of them")
    inner: Replayer
    if job.bundle is not None:
        inner = BundleReplayer.load(job.bundle, job.device, precision=job.precision)
    else:
        inner = EndpointReplayer(job.target or "", job.timeout_ms)
    if job.work is None:
        return inner
    shard, shards = job.shard
    about: dict[str, object] = {
        "log": str(job.log.resolve()),
        "model": _digest(job.bundle / "manifest.json") if job.bundle is not None else job.target,
        "precision": job.precision,
        "shuffle_seed": job.schedule.shuffle_seed,
        "shard": [shard, shards],
    }
    return KeptScores(inner, job.work / f"shard-{shard}-of-{shards}", about)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _skew(job: ReplayJob, replayer: Replayer) -> Skew:
    schema = replayer.schema
    if schema is None:
        raise DataError("features are held against a snapshot by a bundle: a target does not tell which features its model reads")
    sides = []
    for file in job.snapshots:
        snapshot = Snapshot(file.path, schema.side(file.side), key=file.key, time=file.time)
        if file.side == "request" and file.key not in schema.request.names:
            raise DataError(f"{file.path}: key {file.key!r} is no request-level feature; {nearest(file.key, schema.request.names)}")
        sides.append(SideSnapshot(file.side, snapshot))
    return Skew(sides, tolerance=job.tolerance)
