"""The same work on many parts: in this process, in processes of this machine, or on a Ray cluster. Whoever calls merges the results.

Work and parts travel between processes, so `work` is a function of a module and parts are plain data.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Literal, TypeVar, cast

from ninerank.errors import DeviceError

__all__ = ["Where", "map_parts"]

Part = TypeVar("Part")
Result = TypeVar("Result")
Where = Literal["local", "ray"]


def map_parts(
    work: Callable[[Part], Result], parts: Sequence[Part], *, processes: int = 1, where: Where = "local"
) -> Iterator[tuple[int, Result]]:
    """Place and result of each part, as they are done. processes: at once, on this machine; `ray` takes what the cluster has.

    Raises what `work` raises, and DeviceError where Ray is asked for and not installed.
    """
    if where == "ray":
        yield from _on_ray(work, parts)
    elif processes == 1 or len(parts) == 1:
        for place, part in enumerate(parts):
            yield place, work(part)
    else:
        # spawn: a process that is forked from one with threads and locks of torch, Arrow or gRPC may hang.
        with ProcessPoolExecutor(min(processes, len(parts)), multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(work, part): place for place, part in enumerate(parts)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)


def _on_ray(work: Callable[[Part], Result], parts: Sequence[Part]) -> Iterator[tuple[int, Result]]:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise DeviceError("Ray is not installed; this brings it: pip install 'ninerank[ray]'") from error
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False) if _has_cluster() else ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(work)
    places = {remote.remote(part): place for place, part in enumerate(parts)}
    while places:
        (done, *_), _ = ray.wait(list(places), num_returns=1)
        yield places.pop(done), cast("Result", ray.get(done))


def _has_cluster() -> bool:
    import os

    return bool(os.environ.get("RAY_ADDRESS"))
