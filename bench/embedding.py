"""Fused embedding operators against FBGEMM's table-batched embedding and torch's own, and against the memory's speed.

One step is what training does: look up, hand a gradient back, update the touched rows. All rivals get the same ids
(a new batch each round), the same gradient and the same number of threads; results are compared before anything is
timed. FBGEMM runs without its bounds checks; ours keeps them on.

    forward_vs_fbgemm ...     their time over ours, uniform ids, pooling 1, dim 16
    share_of_bandwidth ...    bytes that must move over a copy's bandwidth, over our time: 1 is the limit of the memory

    python bench/embedding.py             the ratios above, then all of ids x pooling x dim (about 5 minutes on two quiet cores)
    python bench/embedding.py --headline  the ratios alone
    python bench/embedding.py --ids zipf --pooling 20 --dim 8 16   a part of the grid, into a file of its own
"""

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, product
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness import Result, Timing, interleave
from ninerank.fusion.kernels import storage
from ninerank.fusion.kernels.embedding_update import FTRL, SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad
from ninerank.fusion.lookup import LookupGrad, looked_up

NUM_TABLES, NUM_ROWS, BATCH_SIZE = 26, 100_000, 4096
LEARNING_RATE, EPS = 0.01, 1e-8
NUM_BATCHES = 8
IDS, POOLINGS, DIMS = ("uniform", "zipf"), (1, 20), (8, 16, 64, 128)
COPY_BYTES = 1 << 29
OPTIMIZERS: dict[str, RowOptimizer] = {
    "sgd": SGD(),
    "adagrad": Adagrad(eps=EPS),
    "rowwise_adagrad": RowwiseAdagrad(eps=EPS),
    "adam": Adam(eps=EPS),
    "ftrl": FTRL(),
}
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """ids: uniform | zipf (exponent 1.05). pooling: ids a bag. rows: of each table."""

    ids: str = "uniform"
    pooling: int = 1
    dim: int = 16
    batch: int = BATCH_SIZE
    rows: int = NUM_ROWS

    @property
    def name(self) -> str:
        return f"{self.ids}_p{self.pooling}_d{self.dim}"

    @property
    def num_ids(self) -> int:
        return NUM_TABLES * self.batch * self.pooling

    @lru_cache(maxsize=1)  # noqa: B019 - cases live as long as the process
    def batches(self) -> list[Tensor]:
        """Ids of several batches, int64, table by table."""
        generator = torch.Generator().manual_seed(1)
        if self.ids == "uniform":
            return [torch.randint(0, self.rows, (self.num_ids,), generator=generator) for _ in range(NUM_BATCHES)]
        cumulated = torch.arange(1, self.rows + 1, dtype=torch.float64).pow(-1.05).cumsum(0)
        drawn = (torch.rand(self.num_ids, generator=generator, dtype=torch.float64) * cumulated[-1] for _ in range(NUM_BATCHES))
        # Popular ids lie anywhere in a table, as they do after hashing.
        place = torch.randperm(self.rows, generator=generator)
        return [place[torch.searchsorted(cumulated, points).clamp(max=self.rows - 1)] for points in drawn]

    @lru_cache(maxsize=1)  # noqa: B019
    def num_touched(self) -> int:
        """Rows that the first batch touches."""
        table = torch.arange(NUM_TABLES).repeat_interleave(self.num_ids // NUM_TABLES) * self.rows
        return int(torch.unique(self.batches()[0] + table).numel())

    def offsets(self) -> Tensor:
        return torch.arange(NUM_TABLES * self.batch + 1) * self.pooling


class Ours:
    """Merged storage, rows with bounds checked, fused update when the gradient arrives."""

    def __init__(self, case: Case, weight: Tensor, optimizer: str) -> None:
        self.weight = torch.nn.Parameter(storage.zeros(tuple(weight.shape)))
        self.weight.data.copy_(weight)
        self.optimizer = OPTIMIZERS[optimizer]
        self.lr = torch.full((NUM_TABLES,), LEARNING_RATE)
        self.state = self.optimizer.new_state(self.weight, self.lr[:1])
        self.first_row, self.num_rows = torch.arange(NUM_TABLES) * case.rows, torch.full((NUM_TABLES,), case.rows)
        self.offsets = None if case.pooling == 1 else case.offsets()

    def forward(self, ids: Tensor) -> Tensor:
        return looked_up(self.weight, ids, self.offsets, self.first_row, self.num_rows, on_grad=self.update)

    def update(self, grad: LookupGrad) -> None:
        grad.apply(self.weight, self.state, self.first_row, self.lr, self.optimizer)

    def finish_step(self) -> None:
        """Nothing is left to do: rows were updated in the backward pass."""

    @staticmethod
    def arranged(grad_BFD: Tensor) -> Tensor:
        return grad_BFD


class Fbgemm:
    """Table-batched embedding on CPU, exact optimizers, no bounds checks, no stochastic rounding."""

    KINDS: ClassVar[dict[str, str]] = {"sgd": "EXACT_SGD", "adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}

    def __init__(self, case: Case, weight: Tensor, optimizer: str) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

        self.module = SplitTableBatchedEmbeddingBagsCodegen(
            [(case.rows, case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * NUM_TABLES,
            optimizer=getattr(EmbOptimType, self.KINDS[optimizer]),
            learning_rate=LEARNING_RATE,
            eps=EPS,
            stochastic_rounding=False,
            bounds_check_mode=BoundsCheckMode.NONE,
            pooling_mode=PoolingMode.SUM,
        )
        for table, part in zip(self.module.split_embedding_weights(), weight.view(NUM_TABLES, case.rows, case.dim), strict=True):
            table.data.copy_(part)
        self.offsets = case.offsets()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.module(ids, self.offsets)
        return out

    def finish_step(self) -> None:
        """Nothing is left to do: rows were updated in the backward pass."""

    @staticmethod
    def arranged(grad_BFD: Tensor) -> Tensor:
        return grad_BFD.flatten(1)

    @property
    def weight(self) -> Tensor:
        return torch.cat(list(self.module.split_embedding_weights()))


class TorchSparse:
    """One EmbeddingBag(sparse=True) over the merged tables, with those optimizers of torch that take sparse gradients."""

    KINDS: ClassVar[dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]]] = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
        "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=LEARNING_RATE, eps=EPS),
        # It adds eps before the bias correction: in the first step, which is compared, this is the same.
        "adam": lambda parameters: torch.optim.SparseAdam(parameters, lr=LEARNING_RATE, eps=EPS * (1 - 0.999) ** 0.5),
    }

    def __init__(self, case: Case, weight: Tensor, optimizer: str) -> None:
        self.module = torch.nn.EmbeddingBag.from_pretrained(weight.clone(), freeze=False, mode="sum", sparse=True, include_last_offset=True)
        self.optimizer = self.KINDS[optimizer](list(self.module.parameters()))
        self.first_row = (torch.arange(NUM_TABLES) * case.rows).repeat_interleave(case.batch * case.pooling)
        self.offsets = case.offsets()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.module(ids + self.first_row, self.offsets)
        return out

    def finish_step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @staticmethod
    def arranged(grad_BFD: Tensor) -> Tensor:
        return grad_BFD.transpose(0, 1).reshape(-1, grad_BFD.shape[-1])

    @property
    def weight(self) -> Tensor:
        return self.module.weight


RIVALS: dict[str, Any] = {"torch": TorchSparse, "fbgemm": Fbgemm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headline", action="store_true", help="uniform ids, pooling 1, dim 16 alone")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of the headline (default 40)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every rival (default: all cores)")
    parser.add_argument("--ids", nargs="+", choices=IDS, default=IDS, help="part of the grid")
    parser.add_argument("--pooling", nargs="+", type=int, choices=POOLINGS, default=POOLINGS, help="part of the grid")
    parser.add_argument("--dim", nargs="+", type=int, choices=DIMS, default=DIMS, help="part of the grid")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|fbgemm_gpu")
    headline = Case()
    part = [list(options.ids), list(options.pooling), list(options.dim)]
    is_whole = part == [list(IDS), list(POOLINGS), list(DIMS)]
    if options.headline and not is_whole:
        parser.error("--headline is no part of the grid: leave out --ids, --pooling and --dim")
    grid = [grid_case(*point) for point in product(*part)]
    shapes = {"tables": NUM_TABLES, "rows": NUM_ROWS, "batch": BATCH_SIZE, "threads": options.threads, "headline": headline.name}
    shapes["elsewhere"] = "tables above dim 16: rows * 16 / dim; pooling 20: batch / 4"
    name = "embedding" if is_whole else "embedding_" + "_".join("-".join(map(str, values)) for values in part)
    with Result(name, shapes) as result:
        bandwidth = copy_bandwidth(result)
        for kind, times in measure(headline, options.rounds, warmup=3) if is_whole else ():
            record(result, headline, kind, times, bandwidth)
            if "fbgemm" in times:
                result.ratio(f"{kind}_vs_fbgemm", times["fbgemm"].p50_ms / times["ours"].p50_ms)
        for case in () if options.headline else grid:
            if case != headline or not is_whole:
                for kind, times in measure(case, rounds=10 if case.pooling == 1 else 3, warmup=1):
                    record(result, case, kind, times, bandwidth)


def grid_case(ids: str, pooling: int, dim: int) -> Case:
    """Wide rows in smaller tables, all of the bytes that dim 16 has at most, and long bags in smaller batches: minutes, not an hour."""
    return Case(ids, pooling, dim, BATCH_SIZE if pooling == 1 else BATCH_SIZE // 4, min(NUM_ROWS, NUM_ROWS * 16 // dim))


def measure(case: Case, rounds: int, warmup: int) -> Iterator[tuple[str, dict[str, Timing]]]:
    """Timings of the forward pass and of a whole step by each optimizer, all rivals in turns."""
    batches = case.batches()
    weight = torch.empty(NUM_TABLES * case.rows, case.dim).uniform_(-0.01, 0.01, generator=torch.Generator().manual_seed(2))
    grad_BFD = torch.randn(case.batch, NUM_TABLES, case.dim, generator=torch.Generator().manual_seed(3)) * 1e-2
    for kind in OPTIMIZERS:
        rivals = {name: rival for name, rival in RIVALS.items() if kind in rival.KINDS}
        players = {"ours": Ours(case, weight, kind)} | {name: rival(case, weight, kind) for name, rival in rivals.items()}
        check(case, batches[0], grad_BFD, players)
        if kind == "sgd":
            yield "forward", interleave({name: forward_of(player, batches) for name, player in players.items()}, rounds, warmup)
        yield kind, interleave({name: step_of(player, batches, grad_BFD) for name, player in players.items()}, rounds, warmup)
        del players


def forward_of(player: Any, batches: list[Tensor]) -> Step:
    """A call that looks the next batch up."""
    turns = cycle(batches)
    return lambda: player.forward(next(turns))


def step_of(player: Any, batches: list[Tensor], grad_BFD: Tensor) -> Step:
    """A call that trains on the next batch."""
    turns, grad = cycle(batches), player.arranged(grad_BFD)

    def step() -> None:
        player.forward(next(turns)).backward(grad)
        player.finish_step()

    return step


def check(case: Case, ids: Tensor, grad_BFD: Tensor, players: dict[str, Any]) -> None:
    """Same outputs, same weights after one step; raises AssertionError with the rival's name."""
    ours = players["ours"]
    expected_out = ours.forward(ids).detach()
    step_of(ours, [ids], grad_BFD)()
    for name, player in players.items():
        if player is ours:
            continue
        out = player.forward(ids).detach()
        step_of(player, [ids], grad_BFD)()
        for what, found, expected in (
            ("outputs", out, player.arranged(expected_out)),
            ("weights", player.weight.detach(), ours.weight.detach()),
        ):
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                raise AssertionError(f"{case.name}: {what} of {name} differ from ours by up to {float((found - expected).abs().max())}")


def record(result: Result, case: Case, kind: str, times: dict[str, Timing], bandwidth: float) -> None:
    result.timings({f"{case.name}_{kind}_{name}": timing for name, timing in times.items()})
    limit_ms = bytes_moved(case, kind) / bandwidth * 1e3
    result.figure(f"{case.name}_{kind}_share_of_bandwidth", limit_ms / times["ours"].p50_ms)
    for name in times.keys() - {"ours"}:
        result.figure(f"{case.name}_{kind}_{name}_over_ours", times[name].p50_ms / times["ours"].p50_ms)


def bytes_moved(case: Case, kind: str) -> int:
    """Least bytes of a step, by the first batch: ids, rows and outputs; then gradients, touched rows and state both ways."""
    touched = case.num_touched()
    row, output = 4 * case.dim, 4 * case.dim * NUM_TABLES * case.batch
    forward = 8 * case.num_ids + row * touched + output
    state = {"forward": 0, "sgd": 0, "adagrad": row, "rowwise_adagrad": 4, "adam": 2 * row + 4, "ftrl": 2 * row}[kind]
    return forward if kind == "forward" else forward + output + 2 * touched * (row + state)


def copy_bandwidth(result: Result) -> float:
    """Bytes a second of a large copy by all threads, bytes read and written both counted."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    bandwidth = 2 * COPY_BYTES / (timing.p50_ms / 1e3)
    result.figure("copy_gb_per_s", bandwidth / 1e9)
    return bandwidth


if __name__ == "__main__":
    main()
