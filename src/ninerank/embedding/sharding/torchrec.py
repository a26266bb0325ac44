"""TorchRec with our compute kernel: collections, sharders and lookups that hold a `BlockStorage` in place of FBGEMM's tables.

What stays TorchRec's: the planner, `DistributedModelParallel`, the way of ids and embeddings between processes (all-to-all,
reduce-scatter, their backward passes, quantised codecs). What is ours: storage, lookup, gradients, update. State is saved
through `Shard`s, so TorchRec's own state of tables is left out.

Tables bear numbers here (`g0_t3`, features `f7`): TorchRec gives a meaning to `.` and `@` in names.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torchrec.distributed import sharding_plan
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import Stats
from torchrec.distributed.types import CommOp, EmbeddingModuleShardingPlan, ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ninerank.embedding.sharding.plan import Block, Placed, Plan
from ninerank.embedding.sharding.storage import BlockStorage, Held
from ninerank.errors import DeviceError

__all__ = [
    "BestPlan",
    "Collections",
    "Features",
    "MakeStorage",
    "check_operators",
    "distribute",
    "jagged",
    "quiet",
    "sharders",
    "table_name",
]

KINDS = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value, ShardingType.DATA_PARALLEL.value]

CODED = (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER, CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL)

# What TorchRec does to ids on their way, on the device that they lie on.
OPERATORS = ("permute_2D_sparse_data", "block_bucketize_sparse_features", "asynchronous_complete_cumsum", "permute_pooled_embs")

# Of these blocks, for so many features that are pooled, or for 0 whose ids are looked up one by one.
MakeStorage = Callable[[tuple[Held, ...], int], BlockStorage]


def table_name(group: int, table: int) -> str:
    """Name of a table at one group's dim."""
    return f"g{group}_t{table}"


def jagged(keys: list[str], values: Tensor, lengths: Tensor) -> KeyedJaggedTensor:
    """Ids of several features, feature by feature."""
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths)


@dataclass(frozen=True)
class Features:
    """A table at one group's dim and the features that look into it."""

    name: str
    num_rows: int
    dim: int
    features: tuple[str, ...]


class Collections(nn.Module):
    """All tables as TorchRec's modules: `bags` for those that are only pooled (None without any), `each` of every group for the others.

    Parameters lie on the meta device until `distribute`.
    """

    def __init__(self, pooled: Sequence[Features], unpooled: Mapping[str, Sequence[Features]]) -> None:
        super().__init__()
        meta = torch.device("meta")
        bags = [
            EmbeddingBagConfig(
                name=each.name,
                embedding_dim=each.dim,
                num_embeddings=each.num_rows,
                feature_names=list(each.features),
                pooling=PoolingType.SUM,
            )
            for each in pooled
        ]
        self.bags = EmbeddingBagCollection(tables=bags, device=meta) if bags else None
        self.each = nn.ModuleDict()
        for name, tables in unpooled.items():
            configs = [
                EmbeddingConfig(name=t.name, embedding_dim=t.dim, num_embeddings=t.num_rows, feature_names=list(t.features)) for t in tables
            ]
            self.each[name] = EmbeddingCollection(tables=configs, device=meta)

    def paths(self) -> dict[str, EmbeddingBagCollection | EmbeddingCollection]:
        """The modules to shard, by their path."""
        own: dict[str, Any] = {} if self.bags is None else {"bags": self.bags}
        return {**own, **{f"each.{name}": module for name, module in self.each.items()}}


class _Kernel(nn.Module):
    """Lookup of one group of tables that TorchRec formed."""

    is_pooled: bool

    def __init__(self, config: GroupedEmbeddingConfig, make: MakeStorage, held: Mapping[str, Held]) -> None:
        super().__init__()
        self.runs: list[tuple[BlockStorage, list[int]]] = []
        tables = config.embedding_tables
        start = 0
        while start < len(tables):
            stop = start
            while stop < len(tables) and tables[stop].local_cols == tables[start].local_cols:
                stop += 1
            own = tables[start:stop]
            table_F = [place for place, table in enumerate(own) for _ in table.feature_names]
            storage = make(tuple(_checked(table, held[table.name]) for table in own), len(table_F) if self.is_pooled else 0)
            self.runs.append((storage, table_F))
            start = stop

    def _parts(self, features: KeyedJaggedTensor) -> list[KeyedJaggedTensor]:
        if len(self.runs) == 1:
            return [features]
        return cast("list[KeyedJaggedTensor]", features.split([len(table_F) for _, table_F in self.runs]))


class _PooledKernel(_Kernel):
    is_pooled = True

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        parts = zip(self.runs, self._parts(features), strict=True)
        found = [storage.look_up_bags(part.values(), part.lengths(), table_F) for (storage, table_F), part in parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


class _EachKernel(_Kernel):
    is_pooled = False

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        parts = zip(self.runs, self._parts(features), strict=True)
        found = [storage.look_up_each(part.values(), part.lengths(), table_F) for (storage, table_F), part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)


def _checked(table: Any, held: Held) -> Held:
    """The block that our plan says, which must be the one TorchRec looks for here."""
    block = held.block
    assert (table.local_rows, table.local_cols) == (len(block.rows), len(block.columns)), f"{held.key}: TorchRec holds another block"
    return held


class _OurLookup:
    """Gives TorchRec's lookups our kernel."""

    kernel: type[_Kernel]

    def __init__(self, configs: list[GroupedEmbeddingConfig], make: MakeStorage, held: Mapping[str, Held], **arguments: Any) -> None:
        self._make, self._held = make, held
        super().__init__(configs, **arguments)  # type: ignore[call-arg]

    def _create_embedding_kernel(self, config: GroupedEmbeddingConfig, *_: Any) -> nn.Module:
        return self.kernel(config, self._make, self._held)


class _PooledLookup(_OurLookup, GroupedPooledEmbeddingsLookup):  # type: ignore[misc]
    kernel = _PooledKernel


class _EachLookup(_OurLookup, GroupedEmbeddingsLookup):  # type: ignore[misc]
    kernel = _EachKernel


class _Bags(ShardedEmbeddingBagCollection):  # type: ignore[misc]
    """TorchRec's sharded bags over our lookups."""

    def __init__(self, make: MakeStorage, held: Mapping[str, Held], **arguments: Any) -> None:
        self._ours = (make, held)
        super().__init__(**arguments)

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            place = {"device": self._device, "pg": self._env.process_group}
            self._lookups.append(_PooledLookup(sharding._grouped_embedding_configs, *self._ours, **place))

    def init_data_parallel(self) -> None:
        """Copies are kept equal by the optimizer, which exchanges touched rows; a dense all-reduce would move whole tables."""

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """Start values and saved state are the storages' own."""


class _Each(ShardedEmbeddingCollection):  # type: ignore[misc]
    """TorchRec's sharded unpooled embeddings over our lookups."""

    def __init__(self, make: MakeStorage, held: Mapping[str, Held], **arguments: Any) -> None:
        self._ours = (make, held)
        super().__init__(**arguments)

    def _create_lookups(self) -> None:
        for sharding in self._sharding_type_to_sharding.values():
            place = {"device": self._device, "pg": self._env.process_group}
            self._lookups.append(_EachLookup(sharding._grouped_embedding_configs, *self._ours, **place))

    def init_data_parallel(self) -> None:
        """See `_Bags`."""

    def _initialize_torch_state(self, skip_registering: bool = False) -> None:
        """See `_Bags`."""


class _OurSharder:
    """Shards over our lookups, row-wise on every kind of device; without `make` it serves planning alone."""

    sharded: type[_Bags] | type[_Each]

    def __init__(self, make: MakeStorage | None, held: Mapping[str, Held], codecs: Any) -> None:
        super().__init__(qcomm_codecs_registry=codecs)  # type: ignore[call-arg]
        self._make, self._held = make, held

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return KINDS

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return _compute_kernels(sharding_type)

    def shard(self, module: Any, params: Any, env: ShardingEnv, device: torch.device | None = None, module_fqn: str | None = None) -> Any:
        assert self._make is not None, "this sharder only plans"
        arguments = {"table_name_to_parameter_sharding": params, "env": env, "device": device, "module_fqn": module_fqn}
        codecs: Any = self.qcomm_codecs_registry  # type: ignore[attr-defined]
        return self.sharded(self._make, self._held, module=module, qcomm_codecs_registry=codecs, **arguments)


class BagSharder(_OurSharder, EmbeddingBagCollectionSharder):  # type: ignore[misc]
    sharded = _Bags


class EachSharder(_OurSharder, EmbeddingCollectionSharder):  # type: ignore[misc]
    sharded = _Each


def _compute_kernels(sharding_type: str) -> list[str]:
    """Names under which TorchRec groups tables; both stand for our kernel."""
    is_copy = sharding_type == ShardingType.DATA_PARALLEL.value
    return [(EmbeddingComputeKernel.DENSE if is_copy else EmbeddingComputeKernel.FUSED).value]


class BestPlan(Stats):  # type: ignore[misc]
    """Takes the plan that TorchRec's planner would print: its options, each with the predicted time of its shards."""

    def __init__(self) -> None:
        self.options: list[Any] = []

    def log(self, *_: Any, best_plan: list[Any], **__: Any) -> None:
        self.options = best_plan


def sharders(make: MakeStorage | None = None, held: Mapping[str, Held] | None = None, codecs: Any = None) -> list[Any]:
    """Sharders of `Collections`; without `make` they serve planning alone."""
    return [BagSharder(make, held or {}, codecs), EachSharder(make, held or {}, codecs)]


def distribute(
    collections: Collections,
    plan: Plan,
    placed: Mapping[str, Placed],
    make: MakeStorage,
    *,
    device: torch.device,
    quantised: str,
    local_world_size: int,
) -> DistributedModelParallel:
    """Put the collections on the processes of the default group as `plan` says; `placed` maps TorchRec's table names to its places.

    Raises DeviceError where TorchRec's operators, which come with fbgemm, do not run on the device.
    """
    check_operators(device.type)
    set_gradient_division(True)
    warnings.filterwarnings("ignore", message="`torch.distributed.[a-z_]+` is deprecated", category=FutureWarning)  # called by TorchRec
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # warns of a name that TorchRec uses
    rank = dist.get_rank()
    held = {name: _held(each, each.block(rank, plan.world_size)) for name, each in placed.items()}
    built = sharders(make, held, _codecs(quantised))
    modules = {
        path: _module_plan(module, plan, placed, built[0 if path == "bags" else 1], device.type, local_world_size)
        for path, module in collections.paths().items()
    }
    with quiet():
        return DistributedModelParallel(
            collections,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device,
            plan=ShardingPlan(plan=modules),
            sharders=built,
            init_data_parallel=False,
            init_parameters=False,
        )


def check_operators(device_type: str) -> None:
    """Raise DeviceError where the fbgemm that is installed brings no kernels for a kind of device: ids could not be sorted by process."""
    key = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}[device_type]
    missing = [name for name in OPERATORS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fbgemm::{name}", key)]
    if missing:
        mend = {"cuda": "pip install 'ninerank[cuda]'", "npu": "install an fbgemm with operators for Ascend, such as RecSDK's"}
        raise DeviceError(
            f"sharded tables on {device_type}: fbgemm has no {', '.join(missing)} there; {mend.get(device_type, 'run ninerank doctor')}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """TorchRec warns through the root logger of what is meant here: tables without a sharding spec, parameters it does not cache."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _held(placed: Placed, block: Block) -> Held:
    return Held(placed.table, placed.group, placed.num_rows, placed.dim, block, is_copy=placed.kind == "data_parallel")


def _module_plan(
    module: Any, plan: Plan, placed: Mapping[str, Placed], sharder: Any, device_type: str, local_world_size: int
) -> EmbeddingModuleShardingPlan:
    generators = {name: _generator(placed[name], plan.world_size) for name in sharder.shardable_parameters(module)}
    return sharding_plan.construct_module_sharding_plan(
        module, generators, sharder=sharder, local_size=local_world_size, world_size=plan.world_size, device_type=device_type
    )


def _generator(placed: Placed, world_size: int) -> Any:
    kernel = _compute_kernels(placed.kind)[0]
    if placed.kind == "table_wise":
        assert placed.rank is not None
        return sharding_plan.table_wise(rank=placed.rank, compute_kernel=kernel)
    if placed.kind == "row_wise":
        return sharding_plan.row_wise(compute_kernel=kernel)
    if placed.kind == "column_wise":
        return sharding_plan.column_wise(size_per_rank=[placed.dim // world_size] * world_size, compute_kernel=kernel)
    return sharding_plan.data_parallel()


def _codecs(quantised: str) -> Any:
    if quantised == "none":
        return None
    precision = CommType(quantised)
    codecs = get_qcomm_codecs(QCommsConfig(forward_precision=precision, backward_precision=precision))
    # One for each operation, as TorchRec would have it, which takes fp16 for bf16 over gloo: that adds both.
    return {operation.name: codecs for operation in CODED}
