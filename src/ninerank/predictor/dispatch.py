"""From the event loop to the models and back: jobs are computed on the loop itself, or by threads beside it.

On the loop (`workers` 0) a request costs no hand-over between threads: the fastest where computing keeps a core busy anyway. One job is
computed a turn of the loop, so that between two of them all calls that came are seen, queued and refused. Threads are for what waits
on something else: a cache over the network, a device.
"""

import asyncio
import threading
import time

from ninerank.predictor.admission import AdmissionQueue, Job, Steps
from ninerank.predictor.call import Call

__all__ = ["Dispatcher"]


class Dispatcher:
    """Computes what `queue` lets through; `run` is awaited on one event loop, `loop`."""

    def __init__(self, queue: AdmissionQueue, workers: int, loop: asyncio.AbstractEventLoop) -> None:
        self.queue = queue
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

    def _compute(self, job: Job) -> None:
        started_ns = time.perf_counter_ns()
        try:
            next(job.steps)
        except StopIteration as stop:
            self.queue.done(job, job.spent_ns + time.perf_counter_ns() - started_ns)
            job.finish(stop.value, None)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's to see, and the next job's turn
            self.queue.done(job, 0)
            job.finish(None, error)
        else:
            job.spent_ns += time.perf_counter_ns() - started_ns
            self.queue.again(job)
