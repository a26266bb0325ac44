"""FBGEMM's table-batched embeddings as the compute kernel of sharded static tables, by name.

The blocks of a storage are one table of FBGEMM's, whose memory the storage shows as its own: start values, checkpoints and plans are those
of our kernels, and either goes on where the other stopped. FBGEMM updates rows inside the backward pass, so that gradients cannot be looked
at before (`schedule.clip_norm`) and each backward pass is a step.

Shape legend: N ids, R rows of the storage, F features, B bags a feature, D columns, T tables.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ninerank.embedding.optimizer import SparseOptimizerConfig
from ninerank.embedding.sharding.plan import Placed
from ninerank.embedding.sharding.storage import BlockStorage, Held
from ninerank.errors import DeviceError, SpecError
from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_update import RowOptimizer

__all__ = ["FBGEMM", "FbgemmStorage", "check_fbgemm", "takes"]

FBGEMM = "fbgemm"
# Rules that FBGEMM has on every device and that are ours, and its names of them.
RULES = {"sgd": "EXACT_SGD", "adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}
COLUMNS = 4
# Settings that no rule of its that runs everywhere takes as ours do.
NOT_TAKEN = ("weight_decay", "max_gradient", "max_row_norm", "table_lr")


def check_fbgemm(config: SparseOptimizerConfig, placed: Sequence[Placed], device: torch.device) -> None:
    """Raise SpecError for an optimizer that FBGEMM cannot apply as one process would, DeviceError for a device that it does not run on."""
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"sharding.kernel: fbgemm does not run on {device.type}; take auto")
    if config.kind not in RULES:
        raise SpecError(f"sharding.kernel fbgemm: it has no {config.kind!r} that is ours; it has {', '.join(RULES)}, or take kernel auto")
    for name in NOT_TAKEN:
        if getattr(config, name):
            raise SpecError(f"sharding.kernel fbgemm: it does not take optimizer.sparse.{name} = {getattr(config, name)}; take kernel auto")
    columns = [each.table for each in placed if each.kind == "column_wise"]
    if columns and config.kind == "rowwise_adagrad":
        raise SpecError(
            f"sharding.kernel fbgemm: table {columns[0]!r} is column-wise, and its row-wise Adagrad takes the mean square of each part of "
            "a row by itself; give the table another kind, or take kernel auto"
        )


def takes(held: Held) -> bool:
    """Whether FBGEMM can hold a block. Columns come in fours; and gradients of copies are exchanged before the update, which it makes in
    the backward pass.
    """
    return not held.is_copy and len(held.block.columns) % COLUMNS == 0


class FbgemmStorage(BlockStorage):
    """Blocks that FBGEMM looks up and updates, once `new_state` has named the rule.

    num_features: that are pooled, 0 where each id is looked up by itself.
    """

    def __init__(self, held: tuple[Held, ...], device: torch.device, num_features: int, *, seed: int, init_std: float) -> None:
        super().__init__(held, device, kernel=registry.AUTO, seed=seed, init_std=init_std)
        self._num_features = num_features
        self._lr = 0.0
        self._tables: Any = None

    def new_state(self, rule: RowOptimizer, lr_T: Tensor) -> dict[str, Tensor]:
        """State by name, views of FBGEMM's, as `weight` is from here on; all blocks have one learning rate (`check_fbgemm`)."""
        started = super().new_state(rule, lr_T)
        if not len(self.weight):  # a process without rows of these tables, which nobody asks
            return started
        self._lr = float(lr_T[0])
        self._tables = _tables(self.weight, rule, self._lr, self._num_features)
        (weight_RD,) = self._tables.split_embedding_weights()
        weight_RD.detach().copy_(self.weight)
        self.weight = nn.Parameter(weight_RD.detach(), requires_grad=False)
        states = [state.detach() for of_table in self._tables.split_optimizer_states() for state in of_table]
        for own, start in zip(states, started.values(), strict=True):
            own.copy_(start)
        return dict(zip(started, states, strict=True))

    def update(self, state: Any, lr_T: Tensor, rule: RowOptimizer) -> None:
        """The backward pass did it."""

    def expect(self, lr_scale: float) -> None:
        if self._tables is not None:
            self._tables.set_learning_rate(self._lr * lr_scale)

    def look_up_bags(self, ids_N: Tensor, length_M: Tensor, table_F: list[int]) -> Tensor:
        if self._tables is None:
            return super().look_up_bags(ids_N, length_M, table_F)
        registry.note("embedding_bag", FBGEMM)
        offsets = torch.cat([length_M.new_zeros(1), length_M.cumsum(0)])
        found: Tensor = self._tables(self._rows(ids_N, length_M, table_F).long(), offsets.long())
        return found

    def look_up_each(self, ids_N: Tensor, length_M: Tensor, table_F: list[int]) -> Tensor:
        if self._tables is None:
            return super().look_up_each(ids_N, length_M, table_F)
        registry.note("embedding_sequence", FBGEMM)
        offsets = torch.tensor([0, ids_N.numel()], device=ids_N.device)
        found: Tensor = self._tables(self._rows(ids_N, length_M, table_F).long(), offsets)
        return found


def _tables(weight_RD: Tensor, rule: RowOptimizer, lr: float, num_features: int) -> Any:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

    is_on_cpu = weight_RD.device.type == "cpu"
    place = (EmbeddingLocation.HOST, ComputeDevice.CPU) if is_on_cpu else (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    settings = rule.model_dump(exclude_none=True)
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(*weight_RD.shape, *place)],
        feature_table_map=[0] * max(1, num_features),
        optimizer=getattr(EmbOptimType, RULES[settings["kind"]]),
        learning_rate=lr,
        **({"eps": settings["eps"]} if "eps" in settings else {}),
        pooling_mode=PoolingMode.SUM if num_features else PoolingMode.NONE,
        device=weight_RD.device,
    )
