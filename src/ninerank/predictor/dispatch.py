"""From the event loop to the models and back: jobs are computed on the loop itself, or by threads beside it.

On the loop (`workers` 0) a request costs no hand-over between threads: the fastest where computing keeps a core busy anyway. One job is
computed a turn of the loop, so that between two of them all calls that came are seen, queued and refused. Threads are for what waits
on something else: a cache over the network, a device.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence

from ninerank.predictor.admission import AdmissionQueue, Ask, Job, Steps
from ninerank.predictor.call import Call
from ninerank.predictor.request import RankOutput

__all__ = ["Dispatcher"]

MERGED_ROWS = 8_192


class Dispatcher:
    """Computes what `queue` lets through; `run` is awaited on one event loop, `loop`.

    merge: rank calls that may be computed at once, of those that wait; nobody is ever waited for.
    """

    def __init__(self, queue: AdmissionQueue, workers: int, loop: asyncio.AbstractEventLoop, merge: int = 1) -> None:
        self.queue = queue
        self._merge = merge
        self._loop = loop
        self._is_pumping = False
        self._threads = [threading.Thread(target=self._work, name=f"rank-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    async def run(self, call: Call, rows: int, steps: Steps) -> bytes:
        """What `steps` returns once its turn has come; raises what it raises, OverloadError or DeadlineError.

        rows: by which its time is told. Between two steps others have their turn.
        """
        future: asyncio.Future[bytes] = self._loop.create_future()

        def settle(answer: bytes | None, error: Exception | None) -> None:
            if future.done():  # cancelled: the client left
                return
            if answer is not None:
                future.set_result(answer)
            elif error is not None:
                future.set_exception(error)

        if self._threads:

            def finish(answer: bytes | None, error: Exception | None) -> None:
                self._loop.call_soon_threadsafe(settle, answer, error)

            self.queue.offer(Job(call, rows, steps, finish, future.cancelled))
        else:
            self.queue.offer(Job(call, rows, steps, settle, future.cancelled))
            if not self._is_pumping:
                self._is_pumping = True
                self._loop.call_soon(self._pump)
        return await future

    def close(self) -> None:
        """End the threads once what waits is computed."""
        self.queue.close()
        for thread in self._threads:
            thread.join()

    def _pump(self) -> None:
        """Compute one job and come again after whatever else the loop has to do."""
        job = self.queue.take(wait=False)
        if job is None:
            self._is_pumping = False
            return
        self._compute(job)
        self._loop.call_soon(self._pump)

    def _work(self) -> None:
        while (job := self.queue.take(wait=True)) is not None:
            self._compute(job)

    def _compute(self, first: Job) -> None:
        asked = [(first, self._step(first, None))]
        if asked[0][1] is not None and self._merge > 1:
            asked += [(job, self._step(job, None)) for job in self.queue.more(self._merge - 1, MERGED_ROWS - first.rows)]
        waiting = [(job, ask) for job, ask in asked if ask is not None]
        while waiting:
            engine = waiting[0][1].engine
            group = [(job, ask) for job, ask in waiting if ask.engine is engine]
            rest = [(job, ask) for job, ask in waiting if ask.engine is not engine]
            # An output may be followed by another Ask.
            following = [(job, self._step(job, output)) for (job, _), output in zip(group, self._outputs(group), strict=True)]
            waiting = rest + [(job, ask) for job, ask in following if ask is not None]

    def _step(self, job: Job, output: RankOutput | Exception | None) -> Ask | None:
        """Go on with `job` until it is done, gives way or asks; what it asks comes back."""
        started_ns = time.perf_counter_ns()
        try:
            ask = job.steps.throw(output) if isinstance(output, Exception) else job.steps.send(output)
        except StopIteration as stop:
            self.queue.done(job, job.spent_ns + time.perf_counter_ns() - started_ns)
            job.finish(stop.value, None)
            return None
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's to see, and the next job's turn
            self.queue.done(job, 0)
            job.finish(None, error)
            return None
        job.spent_ns += time.perf_counter_ns() - started_ns
        if ask is None:
            self.queue.again(job)
        return ask

    def _outputs(self, group: Sequence[tuple[Job, Ask]]) -> list[RankOutput | Exception]:
        """Output or error of each; where all at once cannot be computed each is alone, so that nobody pays for another's fault."""
        engine, started_ns = group[0][1].engine, time.perf_counter_ns()
        outputs: list[RankOutput | Exception] = []
        if len(group) > 1:
            with contextlib.suppress(Exception):
                outputs.extend(engine.rank_many([ask.input for _, ask in group]))
        if not outputs:
            for _, ask in group:
                try:
                    outputs.append(engine.rank(ask.input))
                except Exception as error:  # noqa: BLE001 - its caller's to see
                    outputs.append(error)
        share_ns = (time.perf_counter_ns() - started_ns) // len(group)
        for job, _ in group:
            job.spent_ns += share_ns
        return outputs
