"""`ninerank train`: a recipe becomes a run directory."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ninerank.errors import SpecError

if TYPE_CHECKING:
    from ninerank.training.recipe import Recipe


def run(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe: YAML, JSON, or a Python file that defines recipe(). With --resume: the run's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory to make, or to go on with.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. schedule.epochs=3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    resume_from: Annotated[str | None, typer.Option(metavar="STEP", help="Go on from this checkpoint in --out, e.g. step-400.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that --out holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json instead of a table.")] = False,
    plan: Annotated[
        int | None, typer.Option("--plan", metavar="PROCESSES", min=1, help="Only print how tables would lie over that many processes.")
    ] = None,
) -> None:
    """Train a recipe: checkpoints, history, metrics and the best weights go into --out.

    Ctrl-C saves a checkpoint and exits with code 130. Several processes: torchrun --nproc-per-node 2 -m ninerank train ...
    """
    from rich.console import Console

    from ninerank.device import Device
    from ninerank.training.interrupt import TrainingInterrupted
    from ninerank.training.processes import Processes
    from ninerank.training.trainer import Trainer

    if plan is not None:
        _show_plan(_recipe(recipe, out, overrides or [], resume=False), plan)
        return
    if out is None:
        raise SpecError("no run directory: say where the run goes with --out")
    if overwrite and (resume or resume_from):
        raise SpecError("--overwrite and --resume exclude each other")
    chosen = _recipe(recipe, out, overrides or [], resume=resume or resume_from is not None)
    with Processes.joined(Device.resolve(chosen.device), chosen.sharding.timeout_s) as processes:
        console = Console(stderr=True) if processes.is_first else None
        try:
            trainer = Trainer(chosen, out, resume=resume_from or resume, overwrite=overwrite, console=console, processes=processes)
            metrics = trainer.fit()
        except TrainingInterrupted as stop:
            if processes.is_first:
                print(f"{stop}\ngo on with: ninerank train --resume --out {out}", file=sys.stderr)
            raise SystemExit(130) from None
    if not processes.is_first:
        return
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        _show(metrics, out)


def _recipe(path: Path | None, out: Path | None, overrides: list[str], *, resume: bool) -> "Recipe":
    from ninerank.training.recipe import Recipe
    from ninerank.training.run import RunDir

    if path is not None:
        return Recipe.load(path, overrides)
    if not resume or out is None:
        raise SpecError(
            "no recipe: give a YAML file, e.g. ninerank train examples/frappe_deepfm.yaml --out RUN; only --resume finds its own"
        )
    return RunDir(out).recipe().override(overrides)


def _show_plan(recipe: "Recipe", num_processes: int) -> None:
    from rich.console import Console

    from ninerank.training.parallel import plan_for

    Console(highlight=False).print(plan_for(recipe, num_processes).tables())


def _show(metrics: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    splits = {name: metrics[name] for name in ("valid", "test") if metrics.get(name)}
    table = Table(title=f"epoch {metrics['best_epoch']} of {metrics['epochs']}", title_justify="left")
    table.add_column("metric")
    for name in splits:
        table.add_column(name, justify="right")
    for key in next(iter(splits.values())):
        values = [split.get(key) for split in splits.values()]
        table.add_row(key, *("-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.5f}" for value in values))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{metrics['samples_per_s']:,.0f} samples/s in training, {metrics['seconds']:.0f} s in all; run: {out}", soft_wrap=True)
