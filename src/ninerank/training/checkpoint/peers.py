"""The processes that save and load together: they agree on what they see, so that an error of one is an error of all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed

from ninerank.errors import CheckpointError

__all__ = ["Peers"]

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # a process waits for the slowest one's writing


class Peers:
    """All processes of the default group, which talk through a gloo group of their own: saving in the background disturbs no training.

    Without `torch.distributed`, or with one process, no group is needed. To be made by every process at the same point.
    """

    def __init__(self) -> None:
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self.group: Any = distributed.new_group(backend="gloo", timeout=PATIENCE) if several else None
        self.rank = distributed.get_rank(self.group) if several else 0
        self.world_size = distributed.get_world_size(self.group) if several else 1

    def together(self, act: Callable[[], T]) -> list[T]:
        """What `act` returned on each process; the first error of any process is raised on all, an OSError as CheckpointError."""
        outcome: tuple[T | None, Exception | None]
        try:
            outcome = (act(), None)
        except Exception as error:  # noqa: BLE001  # every process has to hear of it
            outcome = (None, error)
        outcomes: list[Any] = [outcome]
        if self.group is not None:
            outcomes = [None] * self.world_size
            distributed.all_gather_object(outcomes, outcome, group=self.group)
        for rank, (_, problem) in enumerate(outcomes):
            if isinstance(problem, OSError):
                raise CheckpointError(f"process {rank}: {problem}") from problem
            if problem is not None:
                raise problem
        return [value for value, _ in outcomes]

    def from_first(self, act: Callable[[], T]) -> T:
        """What `act` returned on the first process, where alone it ran; its error is raised on all."""
        first: T = self.together(lambda: act() if self.rank == 0 else None)[0]  # type: ignore[assignment]
        return first
