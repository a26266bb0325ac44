"""`ninerank parity BUNDLE`: two devices on one bundle, layer by layer."""

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.evaluation.differences import Difference
    from ninerank.evaluation.layerreport import LayerReport


def run(
    bundle_dir: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle directory that `ninerank export` wrote.")],
    device: Annotated[
        list[str] | None,
        typer.Option(help="Twice: what is right, and what is held against it: cpu, cpu:bf16, cpu:interpreter, cuda:0, npu:0:eager."),
    ] = None,
    layer_budget: Annotated[
        float | None,
        typer.Option(min=0, help="Share of its largest value by which a layer may differ. Default: by precision."),
    ] = None,
    score_budget: Annotated[float | None, typer.Option(min=0, help="Difference of a score that passes. Default: by precision.")] = None,
    random: Annotated[int, typer.Option(min=0, max=1000, help="Random batches beside the golden rows.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the random batches.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
) -> None:
    """Run a bundle's golden rows and random ones on two devices and name the first layer whose values differ by more than they may."""
    if device is None or len(device) != 2:
        raise typer.BadParameter(
            f"give it twice, as in --device cpu --device cuda; it was given {len(device or [])} times", param_hint="--device"
        )
    if any("interpreter" in own.split(":") for own in device):
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is loaded, which torch does on its own account
    from ninerank.evaluation.layerreport import Budget
    from ninerank.evaluation.layers import compare_bundle
    from ninerank.evaluation.page import check_writable, write_text
    from ninerank.evaluation.place import Place
    from ninerank.predictor.bundle import Bundle

    check_writable(out)
    places = (Place.parse(device[0]), Place.parse(device[1]))
    usual = Budget.of(*places)
    budget = Budget(usual.layer if layer_budget is None else layer_budget, usual.score if score_budget is None else score_budget)
    found = compare_bundle(Bundle.load(bundle_dir), places, budget=budget, num_random=random, seed=seed)
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        print(text)
    else:
        _print(found)
        if out is not None:
            print(f"wrote {out}")
    if not found.passed:
        raise typer.Exit(1)


def _print(found: "LayerReport") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ninerank.cli.tables import output

    console = output()
    a, b = (f"{place} ({device}, {by})" for place, device, by in zip(found.places, found.devices, found.runs_by, strict=True))
    title = f"{found.manifest.model_name} {found.manifest.model_version}: {b} against {a}"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for head in ("layer", "operator", "weights"):
        table.add_column(head, overflow="fold")
    for head in ("own", "relative", "in all", "relative", ""):
        table.add_column(head, justify="right", no_wrap=True)
    for layer in found.layers:
        numbers = [*_told(layer.own), *_told(layer.in_all)]
        mark = "" if layer.passed else f"> {layer.allowed:g}"
        style = "" if layer.passed else "bold red"
        table.add_row(Text(layer.name), Text(layer.operator), Text(" ".join(layer.weights)), *numbers, mark, style=style)
    console.print(table)
    for place, kernels in zip(found.places, found.kernels, strict=True):
        used = ", ".join(f"{name} ({count})" for name, count in sorted(kernels.items())) or "none"
        console.print(f"operators of Ninerank on {place}: {used}", markup=False, soft_wrap=True)
    console.print(f"batches: {', '.join(found.batches)}", markup=False, soft_wrap=True)
    console.print(f"{'PASS' if found.passed else 'FAIL'}: {found.verdict}", markup=False, soft_wrap=True)


def _told(difference: "Difference") -> tuple[str, str]:
    return _number(difference.absolute), _number(difference.relative)


def _number(value: float) -> str:
    return "=" if value == 0 else f"{value:.1e}" if math.isfinite(value) else "other"
