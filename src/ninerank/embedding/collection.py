"""All embedding tables of a model and the lookup of a batch.

Shape legend: B scored rows, Fd dense features, Fs pooled fields, L sequence length, D embedding dim of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ninerank.config import Config
from ninerank.embedding.dynamic.config import DynamicTableConfig
from ninerank.embedding.dynamic.table import DynamicTable
from ninerank.embedding.index import BatchIndex, Rows, SequenceLength
from ninerank.embedding.managed import ManagedTable
from ninerank.embedding.part import SIDES, ManagedRows, Part, ids_of, pooled_keys, prepared
from ninerank.embedding.quantize import QuantizedGroup, QuantizedTable
from ninerank.embedding.shard import Shard
from ninerank.embedding.table import TableGroup, TableLayout
from ninerank.embedding.tiers.config import TierConfig
from ninerank.embedding.tiers.table import TieredTable
from ninerank.errors import CheckpointError, DataError, SpecError, nearest
from ninerank.features.batch import Batch, Block
from ninerank.features.spec import FeatureSpec, Side

__all__ = ["EmbeddingCollection", "EmbeddingConfig", "pooled_keys"]


class EmbeddingConfig(Config):
    """How tables are initialised, trained and padded.

    mode: `sparse` updates touched rows alone (a sparse optimizer does it); `dense` makes every table an ordinary parameter with a
    gradient of its full size, as the published reference results need. init_std: rows start from N(0, init_std^2).
    l2: lambda of `(lambda / 2) * ||E||^2` over the whole tables, each step; dense mode alone. sequence_length: sequences are padded
    to the `longest` in the batch, or to their `max` (static shapes), or stay `jagged` in training, one history after another; a bundle
    pads them to the longest then. dynamic: admission, eviction and start of dynamic tables, whose init_std is this one unless given there;
    tables: the same for those it names. tiers: static tables of which the device holds a cache of rows alone; the rest lies in host memory
    or on disk.
    """

    mode: Literal["dense", "sparse"] = "sparse"
    init_std: float = Field(default=0.01, ge=0.0, allow_inf_nan=False)
    l2: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    sequence_length: SequenceLength = "longest"
    dynamic: DynamicTableConfig | None = None
    tables: dict[str, DynamicTableConfig] = Field(default_factory=dict)
    tiers: dict[str, TierConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _l2_needs_dense(self) -> Self:
        if self.l2 > 0 and self.mode == "sparse":
            raise ValueError("l2 over whole tables needs mode 'dense'; in mode 'sparse' give the optimizer a weight_decay (touched rows)")
        return self

    @property
    def padding(self) -> Literal["longest", "max"]:
        """What sequences are padded to where they must be."""
        return "longest" if self.sequence_length == "jagged" else self.sequence_length

    def dynamic_table(self, name: str) -> DynamicTableConfig:
        """Configuration of dynamic table `name`."""
        own = self.tables.get(name) or self.dynamic or DynamicTableConfig()
        return own if "init_std" in own.model_fields_set else own.model_copy(update={"init_std": self.init_std})

    @property
    def untiered(self) -> Self:
        """The same tables, all of them in memory."""
        return self.model_copy(update={"tiers": {}})

    def check_tables(self, spec: FeatureSpec) -> None:
        """Raise SpecError for a name in `tables` that is no dynamic table, one in `tiers` that is no static table, and for dynamic or
        tiered tables in mode `dense`.
        """
        dynamic = [name for name, table in spec.tables.items() if table.is_dynamic]
        static = [name for name in spec.tables if name not in dynamic]
        for name in self.tiers:
            if name in dynamic:
                raise SpecError(f"embedding.tiers: {name!r} is a dynamic table; a tier holds tables of a fixed size")
            if name not in static:
                raise SpecError(f"embedding.tiers: unknown table {name!r}; {nearest(name, static)}")
        if self.tiers and self.mode == "dense":
            raise SpecError(f"embedding.tiers ({', '.join(self.tiers)}) needs mode 'sparse': in mode 'dense' every step changes all rows")
        for name in self.tables:
            if name not in dynamic:
                raise SpecError(f"embedding.tables: {name!r} is no dynamic table of the spec; {nearest(name, dynamic)}")
        if dynamic and self.mode == "dense":
            raise SpecError(f"dynamic tables ({', '.join(dynamic)}) need embedding mode 'sparse': in mode 'dense' a table has a fixed size")


class EmbeddingCollection(nn.Module):
    """All tables of a model and the lookup that turns a batch into a tower's inputs.

    spec: a fitted spec. groups: dim of each group, e.g. `{"deep": 16, "linear": 1}`; every group holds every table.
    Static tables are merged in one storage a group; dynamic and tiered tables are `managed`, each with a storage of its own. `tiers` are
    those of a fixed size: wherever state is named, they stand as if they were static.
    The start values depend on seed, group and table name alone. Raises SpecError for a spec that is not fitted. Close the collection
    when it is no longer used: tiered tables have threads and files.
    """

    def __init__(self, spec: FeatureSpec, groups: Mapping[str, int], config: EmbeddingConfig, *, seed: int) -> None:
        super().__init__()
        if not spec.is_fitted:
            raise SpecError("the feature spec is not fitted: vocabularies and table sizes are unknown; fit it on training data first")
        self.config = config
        self.dims = dict(groups)
        config.check_tables(spec)
        own = {name: table for name, table in spec.tables.items() if table.is_dynamic or name in config.tiers}
        self.layout = TableLayout.of({name: table.num_rows for name, table in spec.tables.items() if name not in own})
        self.static = Part(spec, self.layout)
        self.groups = nn.ModuleDict(
            {
                name: TableGroup.drawn(name, self.layout, dim, sparse=config.mode == "sparse", init_std=config.init_std, seed=seed)
                for name, dim in groups.items()
            }
        )
        self.keys = pooled_keys(spec)
        self.managed: dict[str, ManagedTable] = {}
        self.tiers: dict[str, TieredTable] = {}
        self._parts: dict[str, Part] = {}
        self._expected = {side: (spec.single_keys(side), spec.bag_keys(side), spec.sequence_keys(side)) for side in SIDES}
        for name in own if groups else ():  # `of_tables` brings its own
            if name in config.tiers:
                sizes = (name, own[name].num_rows, groups, config.tiers[name])
                self.manage(spec, TieredTable(*sizes, seed=seed, init_std=config.init_std))
            else:
                self.manage(spec, DynamicTable(name, groups, config.dynamic_table(name), seed=seed))

    @classmethod
    def of_tables(
        cls, spec: FeatureSpec, tables: Mapping[str, Tensor | QuantizedTable], config: EmbeddingConfig, managed: Sequence[ManagedTable] = ()
    ) -> Self:
        """Collection over given storages (V, D), one a group, which it shares, and given managed tables; raises SpecError where V is not
        the spec's, or a managed table of the spec is not given. Quantised tables are read alone. Nothing is tiered, whatever config says.
        """
        collection = cls(spec, {}, config.untiered, seed=0)
        collection.dims = {name: table.dim if isinstance(table, QuantizedTable) else table.shape[-1] for name, table in tables.items()}
        for name, table in tables.items():
            storage = table.storage_VS if isinstance(table, QuantizedTable) else table
            if storage.dim() != 2 or storage.shape[0] != collection.layout.total_rows:
                raise SpecError(f"group {name!r}: storage is {tuple(storage.shape)}, the spec needs {collection.layout.total_rows} rows")
            collection.groups[name] = (
                QuantizedGroup(name, collection.layout, table)
                if isinstance(table, QuantizedTable)
                else TableGroup(name, collection.layout, table, sparse=config.mode == "sparse")
            )
        for own in managed:
            if not (own.name in spec.tables and spec.tables[own.name].is_dynamic):
                raise SpecError(f"table {own.name!r} is no dynamic table of the spec")
            collection.manage(spec, own)
        missing = [name for name, table in spec.tables.items() if table.is_dynamic and name not in collection.managed]
        if missing:
            raise SpecError(f"dynamic tables {', '.join(missing)} of the spec were not given")
        return collection

    def manage(self, spec: FeatureSpec, table: ManagedTable) -> None:
        """Look the features of `table.name` up in this table."""
        self.managed[table.name] = table
        self._parts[table.name] = Part(spec, TableLayout.of({table.name: 0}))
        if isinstance(table, TieredTable):
            self.tiers[table.name] = table
            for _, group in self.named_groups():
                group.elsewhere |= {table.name}

    @property
    def by_id(self) -> dict[str, ManagedTable]:
        """Managed tables whose state is by id and of any length: all but the tiered ones."""
        return {name: table for name, table in self.managed.items() if name not in self.tiers}

    @property
    def looks_ahead(self) -> bool:
        """Whether it is of use to `announce` batches."""
        return any(table.config.prefetch for table in self.tiers.values())

    def announce(self, batch: Batch) -> None:
        """Tell tiered tables which batch comes next, on the host and as `prepare` will be given it; they read its rows ahead.

        Call it on the thread that trains, after `prepare` of the batch before. A wrong announcement, or none, costs time alone.
        """
        for name, table in self.tiers.items():
            if table.config.prefetch:
                table.prefetch(ids_of(batch, self._parts[name]))

    def prepare(self, batch: Batch, *, step: int | None = None) -> Batch:
        """The batch with rows in place of the ids of managed tables; on the host, before it is moved. step: of training, None to read.

        Raises DataError for a batch that does not fit, or that lies on a device.
        """
        if not self.managed or batch.is_prepared:
            return batch
        if batch.item.dense_RF.device.type != "cpu":
            raise DataError("a batch for managed tables must be prepared on the host: call prepare() before moving it to a device")
        self.check(batch)
        return prepared(batch, self._parts, lambda ids: self._rows_of(batch, ids, step))

    def _rows_of(self, batch: Batch, ids: Mapping[str, Tensor], step: int | None) -> Mapping[str, Tensor]:
        """Rows of all ids of a batch, by managed table."""
        return {name: self.managed[name].prepare(own_N, step=step) for name, own_N in ids.items()}

    def finish_step(self, step: int) -> None:
        """End training step number `step`: managed tables age, and may give up rows."""
        for table in self.managed.values():
            table.finish_step(step)

    def close(self) -> None:
        """Give up what managed tables hold beside memory: threads and files. They are of no use afterwards."""
        with ExitStack() as tables:
            for table in self.managed.values():
                tables.callback(table.close)

    def table_metrics(self) -> dict[str, float]:
        """Figures of managed tables: `table.<name>.<figure>`."""
        return {name: value for table in self.managed.values() for name, value in table.metrics().items()}

    @property
    def num_values(self) -> int:
        """Numbers that the tables hold."""
        managed = sum(table.num_rows(group) * dim for table in self.managed.values() for group, dim in table.dims.items())
        return managed + sum(group.storage.numel() for _, group in self.named_groups())

    def forward(self, batch: Batch, *, check: bool = True, pad: bool = False) -> dict[str, Tensor]:
        """A tower's inputs: "dense" (B, Fd); per group "<group>" (B, Fs, D) and "<group>.seq.<name>" (B, L, D); "mask.<name>" (B, L).

        With `sequence_length: jagged` (and not `pad`) a sequence is "<group>.seq.<name>" (N, D), history after history, and
        "offsets.<name>" (B + 1,) instead of the mask. Request features come first, then item features; pooled fields are in the order
        of `pooled_keys`. In a rank call the request side is looked up once per request and repeated per candidate afterwards. Ids are
        checked where they lie on the host; call `check` before moving a batch elsewhere, or give `check=False` for what a Transform of
        the same spec made. A batch that was not prepared for training reads managed tables as they are. Raises DataError.
        """
        batch = self._checked(batch, check)
        dense_request, dense_item = batch.request.dense_RF, batch.item.dense_RF
        if batch.user_row_B is not None:
            dense_request = dense_request.index_select(0, batch.user_row_B)
        inputs = {"dense": torch.cat([dense_request, dense_item], dim=1)}
        indices = self._indices(batch, self.config.padding if pad else self.config.sequence_length)
        for name, dim in self.dims.items():
            fields = []
            for own, part, index in indices:
                values, sequences = index.assemble(self._rows(own, name))
                fields.append((part.keys, values))
                inputs.update({f"{name}.seq.{key}": rows_BLD for key, rows_BLD in sequences.items()})
            inputs[name] = _in_order(fields, self.keys, batch.num_rows, dim)
        return inputs | {key: place for _, _, index in indices for key, place in index.places().items()}

    def sides(self, batch: Batch, *, check: bool = True) -> dict[str, Tensor]:
        """The same inputs with the sides apart, for graphs that compute the request side once; `towers.sides` joins them again.

        "dense.request" (U, Fu), "dense.item" (B, Fi); per group "<group>.request" (U, Fu, D), "<group>.item" (B, Fi, D) and
        "<group>.seq.<name>"; "mask.<name>", with the rows of their own side; "user_row" int64 (B,). check: as in `forward`.
        """
        batch = self._checked(batch, check)
        row_B = batch.user_row_B
        user_row_B = torch.arange(batch.num_rows, device=batch.item.dense_RF.device) if row_B is None else row_B
        inputs = {"dense.request": batch.request.dense_RF, "dense.item": batch.item.dense_RF, "user_row": user_row_B}
        indices = self._indices(batch, self.config.padding, apart=True)
        for name, dim in self.dims.items():
            request, item = [], []
            for own, part, index in indices:
                of_request, of_item, sequences = index.assemble_apart(self._rows(own, name))
                request.append((part.request_keys, of_request))
                item.append((part.item_keys, of_item))
                inputs.update({f"{name}.seq.{key}": rows_RLD for key, rows_RLD in sequences.items()})
            inputs[f"{name}.request"] = _in_order(request, self.keys, batch.request.num_rows, dim)
            inputs[f"{name}.item"] = _in_order(item, self.keys, batch.num_rows, dim)
        return inputs | {key: place for _, _, index in indices for key, place in index.places().items()}

    def _checked(self, batch: Batch, check: bool) -> Batch:
        ready = self.prepare(batch)
        # What `prepare` has just made, it has checked.
        if check and ready is batch and batch.item.dense_RF.device.type == "cpu":
            self.check(batch, ids=False)
        return ready

    def _indices(self, batch: Batch, length: SequenceLength, *, apart: bool = False) -> list[tuple[str | None, Part, BatchIndex]]:
        """Every part with its index of the batch; None names the part of the static tables."""
        parts: list[tuple[str | None, Part]] = [(None, self.static)] if self.layout.names else []
        parts += [(name, self._parts[name]) for name in self.managed]
        return [(name, part, BatchIndex(part.request, part.item, part.select(batch), length=length, apart=apart)) for name, part in parts]

    def _rows(self, table: str | None, group: str) -> Rows:
        return self._group(group) if table is None else ManagedRows(self.managed[table], group)

    def check(self, batch: Batch, *, ids: bool = True) -> None:
        """Raise DataError for an id outside its table, other features than the spec's, or sides that do not fit together.

        ids: whether to look at ids too; the lookup of a batch on the host does by itself.
        """
        num_requests, num_rows, user_row_B = batch.request.num_rows, batch.item.num_rows, batch.user_row_B
        if user_row_B is None:
            if num_requests != num_rows:
                raise DataError(f"batch has {num_requests} request rows and {num_rows} item rows, but no user_row_B")
        elif user_row_B.numel() != num_rows:
            raise DataError(f"user_row_B names a request row for {user_row_B.numel()} candidates, the batch has {num_rows}")
        elif num_rows and not 0 <= int(user_row_B.min()) <= int(user_row_B.max()) < num_requests:
            raise DataError(f"user_row_B spans {int(user_row_B.min())} to {int(user_row_B.max())}, request rows 0 to {num_requests - 1}")
        blocks: dict[Side, Block] = {"request": batch.request, "item": batch.item}
        for side, block in blocks.items():
            for keys, held in zip(self._expected[side], (block.single, block.bags, block.sequences), strict=True):
                if held.keys != keys:
                    raise DataError(f"batch holds the features {list(held.keys)}, this model takes {list(keys)} here")
        for part in (self.static, *(self._parts[name] for name in self.managed)):
            own = part.select(batch)
            part.request.check(own.request, ids=ids and part is self.static)
            part.item.check(own.item, ids=ids and part is self.static)

    def _group(self, name: str) -> TableGroup:
        group = self.groups[name]
        assert isinstance(group, TableGroup)
        return group

    def named_groups(self) -> list[tuple[str, TableGroup]]:
        return [(name, group) for name, group in self.groups.items() if isinstance(group, TableGroup)]

    def static_state(self, *, reading: bool = False) -> dict[str, Tensor | Shard]:
        """Values of all static and tiered tables under `groups.<group>.<table>`, for a checkpoint, or to be filled from one (`reading`)."""
        state: dict[str, Tensor | Shard] = self.groups.state_dict(prefix="groups.")
        for name, table in self.tiers.items():
            columns = table.state_to_fill() if reading else table.values_state()
            state.update({f"groups.{group}.{name}": columns[f"value.{group}"] for group in table.dims})
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to(device)` and its like: the caches of tiered tables go along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for table in self.tiers.values():
            device = fn(torch.empty(0, device=table.device)).device
            if device != table.device:
                table.move_to(device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, table in self.by_id.items():
            destination.update({f"{prefix}managed.{name}.{key}": value for key, value in table.values_state().items()})
        for name, tier in self.tiers.items():
            values = tier.values_state()
            destination.update({f"{prefix}groups.{group}.{name}": values[f"value.{group}"] for group in tier.dims})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, table in self.managed.items():
            if name in self.tiers:
                named = {f"{prefix}groups.{group}.{name}": f"value.{group}" for group in table.dims}
                missing_keys.extend(key for key in named if key not in state_dict)
                if not named.keys() <= state_dict.keys():
                    continue
                values = {own: state_dict[key] for key, own in named.items()}
            else:
                start = f"{prefix}managed.{name}."
                values = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
            try:
                table.load_values(values)
            except CheckpointError as error:
                error_msgs.append(str(error))
        if strict:
            known = tuple(f"{prefix}managed.{name}." for name in self.by_id)
            unexpected_keys.extend(key for key in state_dict if key.startswith(f"{prefix}managed.") and not key.startswith(known))

    def l2_penalty(self) -> Tensor:
        """(l2 / 2) * ||E||^2 over all rows of all tables of all groups; a scalar."""
        if self.config.l2 == 0:
            return torch.zeros((), device=self.named_groups()[0][1].storage.device)
        squares = [group.storage.square().sum() for _, group in self.named_groups()]
        return torch.stack(squares).sum() * (self.config.l2 / 2)


def _in_order(fields: Sequence[tuple[tuple[str, ...], Tensor | None]], order: tuple[str, ...], num_rows: int, dim: int) -> Tensor:
    """Fields (R, Fs, D) of all parts, in the order of `pooled_keys`."""
    held = [(keys, value) for keys, value in fields if value is not None]
    if not held:
        return torch.zeros(num_rows, 0, dim)
    if len(held) == 1:
        return held[0][1]
    columns = {key: column for keys, value in held for key, column in zip(keys, value.unbind(1), strict=True)}
    return torch.stack([columns[key] for key in order if key in columns], dim=1)
