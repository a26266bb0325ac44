"""Entry point of the command `ninerank`: finds the verb, loads that verb's module alone, and turns errors into one line.

Exit codes: 0 done, 1 an error that a user, a file or a peer caused, 2 wrong usage, 130 interrupted.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from ninerank import __version__
from ninerank.errors import NinerankError, nearest

# verb -> what `ninerank --help` says of it; the module is ninerank.cli.<verb>, with `run` (a command) or `app` (sub-commands).
VERBS = {
    "features": "Fit, show and check a feature spec; print its JSON Schema; draw a synthetic log with a known best AUC.",
    "train": "Train a recipe: checkpoints, history, metrics and the best weights go into a run directory.",
    "export": "Write a trained run as a bundle: spec, dense graph, tables, golden rows with their scores, checksums.",
    "fuse": "Show what the graph compiler made of a bundle: passes, work before and after, both graphs drawn.",
    "parity": "Run a bundle on two devices and compare them layer by layer: the first layer that diverges is named.",
    "serve": "Serve a bundle over gRPC until SIGTERM or Ctrl-C, then finish what is under way.",
    "cache": "Features by id in a Redis: load a file, follow updates, look one up.",
    "rank": "Rank one request from a file against a server, or print an example of one.",
    "evaluate": "Measure a run or a bundle on log files: AUC, log loss, calibration, whole and by slice.",
    "auction": "Hold ad auctions of a log again with another model, pricing or reserve: revenue, clicks, who wins.",
    "replay": "Score a served request log again: parity, changed order, and quality if labels are given.",
    "compare": "Compare two bundles over a served log with labels: differences, guardrails, one verdict.",
    "join": "Join labels that came later to a served log: one row a candidate, however large both are.",
    "offpolicy": "Value a policy that did not serve, from a log with propensities: IPS, DR and their kin, with warnings.",
    "bench": "Put load on a server: open or closed loop, percentiles, answers in time, a page.",
    "doctor": "Show what this machine can run, what is missing, and the line that mends it.",
}

# A verb that meets the absence of an optional package says what brings it.
_SERVE, _REPORT, _DOCTOR = "pip install 'ninerank[serve]'", "pip install 'ninerank[report]'", "ninerank doctor   (it names the line)"
_BROUGHT_BY = {
    "grpc": _SERVE,
    "grpc_health": _SERVE,
    "grpc_reflection": _SERVE,
    "google": _SERVE,
    "prometheus_client": _SERVE,
    "redis": _SERVE,
    "matplotlib": _REPORT,
    "tensorboard": _REPORT,
    "torch": _DOCTOR,
    "torchrec": _DOCTOR,
    "fbgemm_gpu": _DOCTOR,
    "torch_npu": _DOCTOR,
}

# The class that typer keeps for itself: unknown options, missing arguments, values that do not fit.
_WrongUsage: Any = typer.BadParameter.__mro__[1]

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments` (default: those of the process) and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in words if not word.startswith("-")), None)
    try:
        raise SystemExit(build(verb)(words, prog_name="ninerank", standalone_mode=False))
    except _WrongUsage as error:
        _refuse(error, words, verb)
    except typer.Abort:
        raise SystemExit(130) from None
    except NinerankError as error:
        _fail(str(error), error)
    except ModuleNotFoundError as error:
        line = _BROUGHT_BY.get((error.name or "").partition(".")[0])
        if line is None:
            raise
        _fail(f"{error.name} is not installed; this brings it: {line}", error)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", error)


def build(verb: str | None) -> typer.Typer:
    """The whole command line; only the module of `verb` is loaded, the other verbs are there for the help page."""
    app = typer.Typer(
        name="ninerank",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name, summary in VERBS.items():
        if name != verb:
            app.command(name, help=summary)(_not_loaded)
            continue
        module = import_module(f"ninerank.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=summary, no_args_is_help=True)
        else:
            app.command(name)(module.run)
    return app


def _not_loaded() -> None:
    """Stands in for the verbs that this command line does not name."""


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    print(f"ninerank {__version__} (Python {sys.version.split()[0]}, torch {torch})")
    raise typer.Exit


def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more; show where an error came from.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the versions.")] = False,
) -> None:
    """Train ranking models on CPU, NVIDIA GPU and Ascend NPU, and serve them."""
    rank = os.environ.get("RANK", "0")
    spare = quiet or rank != "0"  # processes beside the first one speak up only when something is wrong
    configure_logging(logging.DEBUG if verbose else logging.WARNING if spare else logging.INFO, rank)


def configure_logging(level: int, rank: str = "0") -> None:
    """Log to standard error, with the process's rank in every line; other packages from WARNING on."""
    handler = _StandardError()
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ninerank").setLevel(level)


class _StandardError(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever sys.stderr is at the moment, so that a line lands above a live progress bar and not in it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # setStream would flush the old one, which may be closed
        super().emit(record)


def _refuse(error: Any, words: Sequence[str], verb: str | None) -> None:
    """One line for wrong usage, and exit code 2."""
    context, kind = error.ctx, type(error).__name__
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    if kind == "NoArgsIsHelpError":  # the help page was printed when the error was made
        raise SystemExit(2)
    path = f"ninerank {verb}" if verb in VERBS else "ninerank"
    if context is not None:
        path = context.command_path
        if kind == "NoSuchOption":
            message = f"unknown option {error.option_name!r}; {nearest(error.option_name, _long_options(context))}"
        elif message.startswith("No such command"):
            name = error.message.split("'")[1]
            message = f"unknown command {name!r}; {nearest(name, context.command.commands)}"
    given = _given(getattr(error, "param", None), words) if message.startswith("Invalid value") else ""
    print(f"error: {path}: {message[:1].lower()}{message[1:]}{given} (see {path} --help)", file=sys.stderr)
    raise SystemExit(2)


def _given(option: Any, words: Sequence[str]) -> str:
    """The value that `words` give an option, as an error shows it; the exception itself does not carry it."""
    for name in getattr(option, "opts", ()):
        for word, after in zip(words, (*words[1:], ""), strict=True):
            value = after if word == name else word.removeprefix(f"{name}=")
            if word == name or value != word:
                return f" (value {value[:80]!r})"
    return ""


def _long_options(context: Any) -> list[str]:
    names = [name for own in context.command.get_params(context) for name in (*own.opts, *own.secondary_opts)]
    return [name for name in names if name.startswith("--")]


def _fail(message: str, error: Exception) -> None:
    log.debug("where it came from", exc_info=error)
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)
