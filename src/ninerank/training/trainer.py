"""The training loop: batch, forward, backward, step; evaluation after each epoch; the best epoch's weights kept and tested.

Shape legend: B rows, T tasks.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from ninerank.device import Device
from ninerank.embedding.sharding.collection import ShardedEmbeddingCollection
from ninerank.errors import CheckpointError, DeviceError, SpecError
from ninerank.features.batch import Batch
from ninerank.features.spec import FeatureSpec
from ninerank.training.checkpoint import BestWeights, Checkpoint, CheckpointStore, PerProcess
from ninerank.training.checkpoint.peers import Peers
from ninerank.training.display import Display, Stage
from ninerank.training.history import History
from ninerank.training.interrupt import Interrupts, TrainingInterrupted
from ninerank.training.lookahead import with_next
from ninerank.training.loss import binary_cross_entropy, check_task_weights
from ninerank.training.optimizer import ModelOptimizer
from ninerank.training.parallel import agree_on_buffers, build_for, tower_averaged
from ninerank.training.pipeline import Split, fit_spec
from ninerank.training.prefetch import Prefetch
from ninerank.training.processes import Processes
from ninerank.training.recipe import Recipe
from ninerank.training.run import RunDir
from ninerank.training.saved import fill, fill_best, tensors_of, weights_of
from ninerank.training.schedule import EarlyStopping, is_gain
from ninerank.training.scoring import measure
from ninerank.training.state import generator_state, reseed, restore_generators
from ninerank.training.window import Window

__all__ = ["Progress", "Trainer"]

log = logging.getLogger(__name__)

SplitName = Literal["train", "valid", "test"]
ALONE = Processes()
T = TypeVar("T")
REPEAT_S = 5.0
METRICS_SHOWN = ("auc", "gauc", "logloss")


@dataclass
class Progress:
    """How far a run is: with weights, optimizer and generators, all that is needed to go on from the very next batch.

    epoch, batch: of the batch that comes next, from 0. best_epoch: from 1, as people are told.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    train_seconds: float = 0.0
    best_epoch: int | None = None
    best_value: float | None = None
    best_metrics: dict[str, float | None] | None = None
    epochs_without_gain: int = 0
    reductions: int = 0


class Trainer:
    """Trains one recipe into one run directory.

    resume: True goes on from the newest checkpoint, a name such as `step-40` from that one. overwrite: replace a run that is there.
    console: where bars are drawn if it is a terminal. processes: those of the run, each with a trainer that is called alike; the first
    one writes the directory. Raises SpecError, DataError, CheckpointError or DeviceError.
    """

    def __init__(
        self,
        recipe: Recipe,
        out_dir: str | Path,
        *,
        resume: bool | str = False,
        overwrite: bool = False,
        console: Console | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.device = Device.resolve(recipe.device)
        if recipe.precision == "bf16" and self.device.autocast_dtype is None:
            raise DeviceError(f"precision 'bf16': {self.device.name} does not multiply bfloat16; use precision: fp32")
        self.recipe = recipe.resolved(self.device.name)
        self.display = Display(console)
        self.progress = Progress()
        self.run = RunDir(Path(out_dir))
        self.processes = processes
        self._is_stop_asked = False
        self._task_weights = check_task_weights(recipe.loss, recipe.spec.labels)
        self._interrupts = Interrupts(REPEAT_S if processes.world_size > 1 else 0.0)
        self._grad_norm: Tensor | None = None
        self._lr = recipe.optimizer.lr
        for split in ("train", "valid", "test"):
            recipe.data.files(split)
        early = recipe.schedule.early_stopping
        if early is not None and early.metric == "gauc" and recipe.spec.group is None:
            raise SpecError("schedule.early_stopping.metric: 'gauc' needs a `group` column in the spec; it names none")
        self._peers = Peers()
        self._on_first(lambda: self.run.reopen(self.recipe) if resume else self.run.create(self.recipe, overwrite=overwrite))
        self._tables = ExitStack()
        with self.run.undone_on_failure():
            try:
                with self.display:
                    self._prepare(resume)
            except BaseException:
                self.close()
                raise
        self.run.settle()

    def close(self) -> None:
        """Close the model's tables; `fit` does so at its end."""
        self._tables.close()

    def fit(self) -> dict[str, Any]:
        """Train, keep the best epoch, test it; returns what `metrics.json` says. The trainer is closed then, also after an error.

        Raises TrainingInterrupted after SIGINT or SIGTERM, once a checkpoint is saved.
        """
        started_s = time.monotonic()
        keep = self.progress.step
        with (
            self.run.undone_on_failure(lambda: self.progress.step > 0),
            self._tables,
            self.display,
            self._open_history(keep) as self._history,
            self._interrupts.caught(),
            self.store,
        ):
            while not self._is_finished():
                self._train_epoch()
                self._end_epoch()
            return self._report(time.monotonic() - started_s)

    def step(self, host_batch: Batch, following: Batch | None = None) -> tuple[Tensor, Tensor]:
        """One optimizer step on one labelled batch on the host; returns the loss (scalar) and the logits (B, T), detached.

        following: the batch of the next step, where it is known already.
        """
        schedule, collection = self.recipe.schedule, self.model.embedding
        batch = collection.prepare(host_batch, step=self.progress.step)
        if following is not None:
            collection.announce(following)
        batch = batch.to(self.device.torch_device, non_blocking=True)
        assert batch.label_BT is not None
        self._lr = self.optimizer.set_lr(
            schedule.lr, step=self.progress.step, total_steps=self._total_steps, reductions=self.progress.reductions
        )
        with self.device.autocast(self.recipe.precision == "bf16"):
            logits_BT = self._forward(batch)
        loss = self._share_of_loss(logits_BT, batch, host_batch)
        # Gradients are averaged over the processes, whose losses are shares of one.
        total = loss * self.processes.world_size
        if collection.config.l2:
            total = total + collection.l2_penalty()
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        if schedule.clip_norm is not None:
            self._grad_norm = self.optimizer.clip(schedule.clip_norm)
        self.optimizer.step()
        collection.finish_step(self.progress.step)
        return loss.detach(), logits_BT.detach()

    def _share_of_loss(self, logits_BT: Tensor, batch: Batch, host_batch: Batch) -> Tensor:
        """This process's part of the loss over the rows of all: the parts add up to the weighted mean. Padding counts for nothing."""
        assert batch.label_BT is not None
        if self.processes.world_size == 1:
            return binary_cross_entropy(logits_BT, batch.label_BT, batch.weight_B, self._task_weights)
        rows = batch.num_real_rows
        own = float(rows if host_batch.weight_B is None else host_batch.weight_B[:rows].sum())
        whole, asked = self.processes.sum(own, bool(self._interrupts.requested))
        self._is_stop_asked = asked > 0
        if not rows or not whole:
            return logits_BT.sum() * 0.0
        weight_B = None if batch.weight_B is None else batch.weight_B[:rows]
        return binary_cross_entropy(logits_BT[:rows], batch.label_BT[:rows], weight_B, self._task_weights) * (own / whole)

    def _train_epoch(self) -> None:
        progress, schedule, every = self.progress, self.recipe.schedule, self.recipe.checkpoint.every_steps
        self.model.train()
        window = Window()
        source = self.train.epoch(progress.epoch, progress.batch)
        with (
            Prefetch(source, self.recipe.data.prefetch) as batches,
            self.display.stage(f"epoch {progress.epoch + 1}/{schedule.epochs}", self.train.num_rows) as stage,
        ):
            stage.advance(progress.batch * self.train.batch_size)
            pairs = with_next(batches) if self.model.embedding.looks_ahead else ((batch, None) for batch in batches)
            for batch, following in pairs:
                if progress.step == schedule.max_steps:
                    break
                loss, logits_BT = self.step(batch, following)
                progress.batch += 1
                progress.step += 1
                window.add(loss, logits_BT, batch)
                stage.advance(batch.num_real_rows * self.processes.world_size)
                if progress.step % self.recipe.log.every_steps == 0:
                    window = self._close_window(window, stage)
                self.store.check()
                if every is not None and progress.step % every == 0:
                    window = self._close_window(window, stage)
                    self._save()
                if self._interrupts.requested if self.processes.world_size == 1 else self._is_stop_asked:
                    self._close_window(window, stage)
                    self._stop()
            self._close_window(window, stage)

    def _close_window(self, window: Window, stage: Stage) -> Window:
        """Write the figures of the steps since the last time; returns an empty window."""
        progress = self.progress
        if window.steps:
            window = window.together(self.processes)
            seconds = window.seconds
            progress.samples += window.samples
            progress.train_seconds += seconds
            loss, train_auc, speed = window.loss(progress.step), window.auc(), window.samples / max(seconds, 1e-9)
            row = {"step": progress.step, "epoch": progress.epoch + 1, "samples": progress.samples, "loss": loss, "lr": self._lr}
            norm = None if self._grad_norm is None else float(self._grad_norm)
            tables = self.model.embedding.table_metrics()
            self._write({**row, "grad_norm": norm, "train_auc": train_auc, "samples_per_s": speed, **tables})
            stage.show(f"{speed:,.0f} samples/s, loss {loss:.4f}" + ("" if train_auc is None else f", AUC {train_auc:.4f}"))
        return Window()

    def _end_epoch(self) -> None:
        """Evaluate, keep the weights if they are the best so far, save, pass on to the next epoch."""
        progress, early = self.progress, self.recipe.schedule.early_stopping or EarlyStopping()
        metrics = self._measure(self.valid, "validate")
        value = metrics[early.metric]
        progress.epoch += 1
        progress.batch = 0
        if is_gain(early.metric, value, progress.best_value, early.min_delta):
            progress.best_epoch, progress.best_value, progress.best_metrics = progress.epoch, value, metrics
            progress.epochs_without_gain = 0
            self.best.save(weights_of(self.model), epoch=progress.epoch)
        else:
            progress.epochs_without_gain += 1
            progress.reductions += 1
        self._write({"step": progress.step, "epoch": progress.epoch, **{f"valid_{key}": metrics.get(key) for key in METRICS_SHOWN}})
        log.info("epoch %d: valid %s%s", progress.epoch, phrase(metrics), " (best so far)" if not progress.epochs_without_gain else "")
        self._save()

    def _report(self, seconds: float) -> dict[str, Any]:
        """Test the best epoch's weights and write `metrics.json`."""
        progress = self.progress
        fill_best(self.best, self.model)
        metrics: dict[str, Any] = {"valid": progress.best_metrics}
        if self.recipe.data.test is not None:
            metrics["test"] = self._measure(self._split("test"), "test")
        metrics.update(
            {
                "samples_per_s": progress.samples / max(progress.train_seconds, 1e-9),
                "epochs": progress.epoch,
                "best_epoch": progress.best_epoch,
                "steps": progress.step,
                "samples": progress.samples,
                "seconds": seconds,
                "parameters": self.model.num_parameters,
                "tables": self.model.embedding.table_metrics(),
                "seed": self.recipe.seed,
                "device": self.device.name,
                "spec_digest": self.spec.digest,
            }
        )
        if self.processes.world_size > 1:
            metrics["processes"] = self.processes.world_size
        self._on_first(lambda: self.run.write_metrics(metrics))
        return metrics

    def _open_history(self, keep_to_step: int) -> AbstractContextManager[History | None]:
        if not self.processes.is_first:
            return nullcontext()
        return History(self.run.path, tensorboard=self.recipe.log.tensorboard, keep_to_step=keep_to_step)

    def _write(self, row: Mapping[str, float | None]) -> None:
        if self._history is not None:
            self._history.write(row)

    def _on_first(self, act: Callable[[], T]) -> T:
        """What `act` does on the first process alone; its error is raised on all."""
        return act() if self.processes.world_size == 1 else self._peers.from_first(act)

    def _measure(self, split: Split, label: str) -> dict[str, float | None]:
        agree_on_buffers(self.model, self.processes)
        with Prefetch(split.epoch(0), self.recipe.data.prefetch) as batches, self.display.stage(label, split.num_rows) as stage:

            def advance(num_rows: int) -> None:
                stage.advance(num_rows * self.processes.world_size)
                if any(self.processes.sum(bool(self._interrupts.requested))):
                    self._stop()

            place: dict[str, Any] = {"device": self.device.torch_device, "processes": self.processes}
            return measure(self.model, batches, self.spec.labels, on_rows=advance, **place)

    def _is_finished(self) -> bool:
        schedule, progress = self.recipe.schedule, self.progress
        if progress.batch:
            return False
        out_of_patience = schedule.early_stopping is not None and progress.epochs_without_gain >= schedule.early_stopping.patience
        return out_of_patience or progress.epoch >= schedule.epochs or progress.step >= (schedule.max_steps or 1 << 62)

    def _prepare(self, resume: bool | str) -> None:
        recipe = self.recipe
        self.spec = self._on_first(lambda: self.run.spec() if resume and self.run.spec_path.is_file() else self._fit_spec())
        self._on_first(lambda: self.run.write_versions(self.device))
        self.device.activate()
        torch.manual_seed(recipe.seed + self.processes.rank)
        self.model = build_for(recipe, self.spec, self.device, self.processes)
        self._tables.callback(self.model.embedding.close)
        self._forward = tower_averaged(self.model, self.device, self.processes)
        if isinstance(self.model.embedding, ShardedEmbeddingCollection):
            self.display.print(self.model.embedding.plan.tables())
        self.optimizer = ModelOptimizer(self.model.tower, self.model.embedding, recipe.optimizer)
        policy = recipe.checkpoint
        is_on_disk = any(tier.placement == "disk" for tier in recipe.embedding.tiers.values())  # no copy in memory of what may not fit it
        # Each with peers of its own: a save goes on in the background while others talk.
        self.store = CheckpointStore(
            self.run.checkpoints,
            keep_last=policy.keep_last,
            spec_digest=self.spec.digest,
            asynchronous=policy.asynchronous and not is_on_disk,
        )
        self.best = BestWeights(self.run.best, spec_digest=self.spec.digest)
        self.train, self.valid = self._split("train"), self._split("valid")
        self._total_steps = min(recipe.schedule.epochs * self.train.num_batches, recipe.schedule.max_steps or 1 << 62)
        checkpoint = self.store.load(resume if isinstance(resume, str) else None) if resume else None
        if checkpoint is not None:
            self._restore(checkpoint)

    def _fit_spec(self) -> FeatureSpec:
        with self.display.stage("fit spec", None) as stage:
            spec = fit_spec(self.recipe.spec, self.recipe.data.files("train"), self.recipe.data, stage.advance)
        spec.save(self.run.spec_path)
        return spec

    def _split(self, name: SplitName) -> Split:
        with self.display.stage(f"read {name}", None) as stage:
            return Split(
                self.recipe.data.files(name),
                self.recipe.data,
                self.spec,
                embedding=self.model.embedding,
                training=name == "train",
                seed=self.recipe.seed,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
                on_rows=stage.advance,
            )

    def _data_state(self) -> dict[str, int | bool]:
        """What the order of the training rows hangs on."""
        order = {"num_rows": self.train.num_rows, "in_memory": self.train.in_memory}
        is_alone = self.train.in_memory or self.processes.world_size == 1
        return order if is_alone else order | {"processes": self.processes.world_size}

    def _save(self) -> Path:
        agree_on_buffers(self.model, self.processes)
        tensors, optimizer = tensors_of(self.model, self.optimizer)
        state = {"progress": asdict(self.progress), "optimizer": optimizer, "train": self._data_state()}
        random = PerProcess(generator_state(self.device.torch_device))
        return self.store.save(self.progress.step, tensors | {"random": random}, state)

    def _restore(self, checkpoint: Checkpoint) -> None:
        where, state = str(checkpoint.directory), checkpoint.state
        train = self._data_state()
        if state["train"] != train:
            raise CheckpointError(f"{where}: was saved over training data {state['train']}, they are now {train}: their order would differ")
        fill(checkpoint, state["optimizer"], self.model, self.optimizer)
        self.progress = Progress(**state["progress"])
        generators = checkpoint.own("random")
        if generators is None:
            torch.manual_seed(reseed(self.recipe.seed, self.progress.step, self.processes.rank))
        else:
            restore_generators(self.device.torch_device, generators)
        log.info("resumed from %s: epoch %d, batch %d", where, self.progress.epoch + 1, self.progress.batch)

    def _stop(self) -> NoReturn:
        # Between epochs everything is saved already, and during the test the model holds the best weights, not the last ones.
        path = self._save() if self.progress.batch else self.store.directory / f"step-{self.progress.step}"
        self.store.wait()
        raise TrainingInterrupted(self._interrupts.requested or "a signal", path)


def phrase(metrics: dict[str, float | None]) -> str:
    """The metrics people look at first, e.g. `auc 0.9845, logloss 0.1560`."""
    return ", ".join(f"{key} {value:.4f}" for key in METRICS_SHOWN if (value := metrics.get(key)) is not None)
