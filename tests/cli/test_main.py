"""The command line as a whole: what it loads, how it fails, what it logs."""

import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import pytest

from ninerank.cli import main as cli
from ninerank.errors import DataError


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and error output of `ninerank <words>`."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    code = exit_.value.code
    assert isinstance(code, int) or code is None
    return (code or 0, *capsys.readouterr())


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Adds a verb `probe` that runs the given function."""

    def add(function: Callable[[], None]) -> None:
        module = ModuleType("ninerank.cli.probe")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ninerank.cli.probe", module)
        monkeypatch.setitem(cli.VERBS, "probe", "Tries something.")

    return add


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> object:
    root, own = logging.getLogger(), logging.getLogger("ninerank")
    state = root.handlers[:], root.level, own.level
    yield
    root.handlers[:], level, own_level = state
    root.setLevel(level)
    own.setLevel(own_level)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0
    for name in cli.VERBS:
        assert name in out


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(f"ninerank.cli.{name}")
    assert hasattr(module, "app") != hasattr(module, "run")
    code, out, _ = run(name, "--help", capsys=capsys)
    assert code == 0
    assert f"ninerank {name}" in out
    assert cli.VERBS[name].endswith(".")


def test_only_the_named_verb_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(cli, "import_module", lambda name: loaded.append(name) or import_module(name))
    cli.build("doctor")
    assert loaded == ["ninerank.cli.doctor"]
    cli.build(None)
    assert loaded == ["ninerank.cli.doctor"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--version", capsys=capsys)
    assert code == 0
    assert out.startswith(f"ninerank {cli.__version__} (Python 3.")
    assert "torch 2." in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("docter", "ninerank: unknown command 'docter'; did you mean 'doctor'? valid: auction, "),
        ("--nosuch", "ninerank: unknown option '--nosuch'; valid: --help, --quiet, --verbose, --version "),
        ("doctor --nosuch", "ninerank doctor: unknown option '--nosuch'; valid: --device, --help, --json, --redis "),
        ("doctor extra", "ninerank doctor: got unexpected extra argument(s) (extra) "),
        ("train r.yaml --resum", "ninerank train: unknown option '--resum'; did you mean '--resume'? valid: "),
        ("train r.yaml --set", "ninerank train: option '--set' requires an argument "),
        ("export", "ninerank export: missing argument 'RUN' "),
        ("evaluate run", "ninerank evaluate: missing argument 'data' "),
        ("features ft", "ninerank features: unknown command 'ft'; did you mean 'fit'? valid: check, fit, "),
        ("features fit", "ninerank features fit: missing argument 'spec' "),
        ("serve b --port x", "ninerank serve: invalid value for '--port' / '-p': Input should be a valid integer, "),
        ("serve b -p 70000", "ninerank serve: invalid value for '--port' / '-p': Input should be less than or equal to 65535 "),
        ("rank --candidates 0", "ninerank rank: invalid value for '--candidates': Input should be greater than or equal to 1 (value '0') "),
        ("replay x", "ninerank replay: invalid value for --bundle / --target: give one of --bundle and --target "),
        ("replay x --bundle b --unlabelled q", "ninerank replay: invalid value for '--unlabelled': 'q' is not one of 'skip', 'zero' "),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exits_with_2(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(*line.split(), capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert err.endswith("--help)\n")


def test_no_words_show_the_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("features",)):
        code, out, err = run(*words, capsys=capsys)
        assert (code, err) == (2, "")
        assert "Usage: ninerank" in out


def test_own_errors_are_one_line_and_exit_with_1(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise DataError("rows.csv: column 'x' is missing; there are: y")

    verb(fail)
    assert run("probe", capsys=capsys) == (1, "", "error: rows.csv: column 'x' is missing; there are: y\n")


def test_verbose_shows_where_an_error_came_from(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise DataError("bad row")

    verb(fail)
    code, _, err = run("-v", "probe", capsys=capsys)
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("error: bad row\n")


def test_files_that_cannot_be_used_are_named(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        open("/nowhere/at/all", encoding="utf-8").close()  # noqa: PTH123

    verb(fail)
    assert run("probe", capsys=capsys) == (1, "", "error: /nowhere/at/all: No such file or directory\n")


def test_a_missing_extra_is_named(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'grpc'", name="grpc")

    verb(fail)
    code, _, err = run("probe", capsys=capsys)
    assert code == 1
    assert err == "error: grpc is not installed; this brings it: pip install 'ninerank[serve]'\n"


def test_our_own_faults_are_not_hidden(verb: Callable[..., None]) -> None:
    for fault in (
        ZeroDivisionError("x"),
        ModuleNotFoundError("No module named 'ninerank.nope'", name="ninerank.nope"),
        OSError("no file named"),
    ):

        def fail(fault: Exception = fault) -> None:
            raise fault

        verb(lambda fail=fail: fail())
        with pytest.raises(type(fault)):
            cli.main(["probe"])


def test_interruption_exits_with_130(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    verb(fail)
    code, _, err = run("probe", capsys=capsys)
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "rank", "levels"),
    [
        ([], None, ["INFO", "WARNING"]),
        (["-q"], None, ["WARNING"]),
        (["-v"], None, ["DEBUG", "INFO", "WARNING"]),
        ([], "1", ["WARNING"]),
        (["-v"], "1", ["DEBUG", "INFO", "WARNING"]),
    ],
)
def test_log_lines_carry_the_rank(
    flags: list[str],
    rank: str | None,
    levels: list[str],
    verb: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def speak() -> None:
        log = logging.getLogger("ninerank.probe")
        log.debug("one")
        log.info("two")
        log.warning("three")
        logging.getLogger("elsewhere").info("not shown")

    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    verb(speak)
    code, out, err = run(*flags, "probe", capsys=capsys)
    assert (code, out) == (0, "")
    words = [line.split() for line in err.splitlines()]
    assert [word[3] for word in words] == levels
    assert all(word[1:3] == ["rank", rank or "0"] for word in words)


def test_python_dash_m_is_the_command() -> None:
    outcome = subprocess.run([sys.executable, "-m", "ninerank", "--version"], capture_output=True, text=True, check=True)
    assert outcome.stdout.startswith(f"ninerank {cli.__version__}")
