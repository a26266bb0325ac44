"""Tables over several processes: static ones on TorchRec, dynamic ones dealt out by id. Importing this package loads no TorchRec.

collection = ShardedEmbeddingCollection(spec, groups, config, seed=..., sharding=ShardingConfig(), ...)
optimizer = ShardedOptimizer(collection, SparseOptimizerConfig())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ninerank.embedding.sharding.config import ShardingConfig, ShardingKind
from ninerank.embedding.sharding.plan import Machine, Plan

if TYPE_CHECKING:
    from ninerank.embedding.sharding.collection import ShardedEmbeddingCollection
    from ninerank.embedding.sharding.optimizer import ShardedOptimizer, row_bytes
    from ninerank.embedding.sharding.planner import make_plan

__all__ = ["Machine", "Plan", "ShardedEmbeddingCollection", "ShardedOptimizer", "ShardingConfig", "ShardingKind", "make_plan", "row_bytes"]

_LAZY = {
    "make_plan": "planner",
    "ShardedEmbeddingCollection": "collection",
    "ShardedOptimizer": "optimizer",
    "row_bytes": "optimizer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
