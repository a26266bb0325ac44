"""Scores of a replay under way, kept so that one that was interrupted goes on where it was.

Each shard writes its answers in the order of its requests, 1,000 at a time, whole files or none: `0003.parquet` of `shard-1-of-4/`.
`work.json` says what the answers are of; a folder of other work is refused.

Shape legend: N candidates, T tasks.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ninerank.errors import DataError
from ninerank.evaluation.replayer import Answer, Replayer
from ninerank.files import replacing

if TYPE_CHECKING:
    from ninerank.predictor.request import RankInput
    from ninerank.predictor.requestlog import LoggedRequest

__all__ = ["KeptScores"]

FILE_REQUESTS = 1_000


class KeptScores(Replayer):
    """Answers from `directory` while it has them, then from `inner`, whose answers it keeps. The requests come in one fixed order.

    about: what the answers depend on; raises DataError where `directory` was written about something else, or is damaged.
    """

    def __init__(self, inner: Replayer, directory: Path, about: dict[str, object]) -> None:
        self.source, self.kind, self.device = inner.source, inner.kind, inner.device
        self.spec_digest, self.tasks, self.schema = inner.spec_digest, inner.tasks, inner.schema
        self._inner, self._directory = inner, directory
        self._waiting: list[tuple[str, Answer]] = []
        directory.mkdir(parents=True, exist_ok=True)
        _check_about(directory / "work.json", about)
        self._files = sorted(directory.glob("*.parquet"))
        self._num_files = len(self._files)
        self._kept = self._read()

    def rank(self, request: "LoggedRequest") -> Answer:
        kept = next(self._kept, None)
        if kept is not None:
            request_id, answer = kept
            if request_id != request.request_id or answer.scores_NT.shape != request.scores_NT.shape:
                raise DataError(
                    f"{self._directory}: holds scores of request {request_id!r} where {request.request_id!r} comes; the log changed"
                )
            return answer
        answer = self._inner.rank(request)
        self._waiting.append((request.request_id, answer))
        if len(self._waiting) >= FILE_REQUESTS:
            self._flush()
        return answer

    def score(self, request: "LoggedRequest", features: "RankInput") -> npt.NDArray[np.float32]:
        return self._inner.score(request, features)

    def close(self) -> None:
        """Keep what waits, also where the replay was interrupted."""
        self._flush()
        self._inner.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        ids, answers = zip(*self._waiting, strict=True)
        table = pa.table(
            {
                "request_id": pa.array(ids, pa.string()),
                "model_name": pa.array([answer.model_name for answer in answers], pa.string()),
                "model_version": pa.array([answer.model_version for answer in answers], pa.string()),
                "num_tasks": pa.array([answer.scores_NT.shape[1] for answer in answers], pa.int32()),
                "scores": pa.array([answer.scores_NT.ravel() for answer in answers], pa.list_(pa.float32())),
            }
        )
        with replacing(self._directory / f"{self._num_files:06d}.parquet") as temporary:
            pq.write_table(table, temporary)
        self._num_files += 1
        self._waiting = []

    def _read(self) -> Iterator[tuple[str, Answer]]:
        for file in self._files:
            try:
                table = pq.read_table(file)
                scores = table.column("scores").combine_chunks()
                for row, about in enumerate(table.drop_columns(["scores"]).to_pylist()):
                    own = scores.slice(row, 1).flatten().to_numpy().reshape(-1, about["num_tasks"])
                    yield about["request_id"], Answer(own, about["model_name"], about["model_version"])
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{file}: cannot be read as scores of a replay ({error}); remove {self._directory} to begin anew") from None


def _check_about(path: Path, about: dict[str, object]) -> None:
    if path.exists():
        try:
            was = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path}: is no JSON; remove {path.parent} to begin anew") from None
        if was != about:
            other = next(name for name in sorted({*about, *was}) if about.get(name) != was.get(name))
            raise DataError(
                f"{path.parent}: holds scores of another replay ({other} {was.get(other)!r}, now {about.get(other)!r}); name another folder"
            )
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(about, sort_keys=True), encoding="utf-8")
