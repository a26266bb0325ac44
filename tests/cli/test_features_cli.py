"""`ninerank features` as a person runs it: what each sub-command prints and writes, and one line for each mistake."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ninerank.cli.main import main
from ninerank.features.spec import FeatureSpec

SPEC = """
labels: [click]
features:
- {name: user, role: user, kind: id}
- {name: seen, role: user, kind: sequence, of: item}
- {name: item, role: item, kind: id, dtype: int64, encoding: {kind: vocabulary, min_count: 2}}
- {name: price, role: item, kind: numeric, transform: {kind: standardise}}
"""
ROWS = pa.table(
    {
        "click": [1, 0, 0, 1],
        "user": ["ann", "bob", None, "ann"],
        "seen": [[1, 2], [], None, [3]],
        "item": [1, 2, 1, 4],
        "price": [1.0, 3.0, None, 2.0],
    }
)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Ninerank = Callable[..., Done]


@pytest.fixture
def ninerank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ninerank]:
    """Runs `ninerank features ...` in this process, on a wide terminal; leaves logging as it was."""
    root, own = logging.getLogger(), logging.getLogger("ninerank")
    state = root.handlers[:], root.level, own.level
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str | Path) -> Done:
        with pytest.raises(SystemExit) as end:
            main(["features", *map(str, words)])
        return Done(int(end.value.code or 0), *capsys.readouterr())

    yield run
    root.handlers[:] = state[0]
    root.setLevel(state[1])
    own.setLevel(state[2])


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path / "spec.yaml"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    pq.write_table(ROWS, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


@pytest.mark.parametrize("name", ["fitted.json", "fitted.yaml"])
def test_fit_writes_a_spec_that_is_fitted(name: str, ninerank: Ninerank, spec: Path, log: Path, tmp_path: Path) -> None:
    done = ninerank("fit", spec, log, "--out", tmp_path / name)
    assert done.code == 0
    fitted = FeatureSpec.load(tmp_path / name)
    assert fitted.is_fitted
    assert f"fitted on 4 rows, digest {fitted.digest}" in done.out
    assert f"wrote {tmp_path / name}" in done.out
    assert {key: table.num_rows for key, table in fitted.tables.items()} == {"user": 3, "item": 3}


def test_a_text_file_that_is_not_utf_8_is_refused(ninerank: Ninerank, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"\xff\xfe\x00bad\n1\n")
    done = ninerank("check", spec, tmp_path / "log.csv")
    assert done.code == 1
    assert re.fullmatch(r"error: .*log\.csv: its first line is not UTF-8 text \(invalid start byte at byte 0\)\n", done.err)


def test_fit_on_the_first_rows_only(ninerank: Ninerank, spec: Path, log: Path, tmp_path: Path) -> None:
    done = ninerank("fit", spec, log, "--out", tmp_path / "out.json", "--rows", "1")
    assert done.code == 0
    assert "fitted on 1 rows" in done.out
    assert FeatureSpec.load(tmp_path / "out.json").tables["user"].num_rows == 2


def test_fit_on_text_with_a_format_said(ninerank: Ninerank, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("click\tuser\tseen\titem\tprice\n1\tann\t1|2\t1\t0.5\n0\tbob\t\t1\t1.5\n")
    done = ninerank("fit", spec, tmp_path / "log.txt", "--format", "tsv", "-o", tmp_path / "out.json")
    assert (done.code, done.err.strip()) == (0, "")
    assert FeatureSpec.load(tmp_path / "out.json").tables["item"].num_rows == 2


def test_show_lists_features_and_says_what_is_not_fitted(ninerank: Ninerank, spec: Path) -> None:
    done = ninerank("show", spec)
    assert done.code == 0
    for word in ("user", "seen", "last 50 of item", "standardise", "not fitted", FeatureSpec.load(spec).digest):
        assert word in done.out


def test_show_as_json(ninerank: Ninerank, spec: Path, log: Path, tmp_path: Path) -> None:
    ninerank("fit", spec, log, "--out", tmp_path / "fitted.json")
    shown = json.loads(ninerank("show", tmp_path / "fitted.json", "--json").out)
    assert shown["fitted"] is True
    assert shown["digest"] == FeatureSpec.load(tmp_path / "fitted.json").digest
    assert shown["tables"] == {
        "user": {"num_rows": 3, "dynamic": False, "features": ["user"]},
        "item": {"num_rows": 3, "dynamic": False, "features": ["seen", "item"]},
    }
    assert list(shown["features"]) == ["user", "seen", "item", "price"]
    unfitted = json.loads(ninerank("show", spec, "--json").out)
    assert (unfitted["fitted"], unfitted["tables"]) == (False, None)


def test_a_dynamic_table_is_shown_as_one(ninerank: Ninerank, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("labels: [y]\nfeatures:\n- {name: a, kind: id, role: user, encoding: {kind: dynamic}}\n")
    done = ninerank("show", tmp_path / "spec.yaml")
    assert (done.code, done.out.count("dynamic"), "not fitted" in done.out) == (0, 2, False)
    shown = json.loads(ninerank("show", tmp_path / "spec.yaml", "--json").out)
    assert shown["tables"] == {"a": {"num_rows": 0, "dynamic": True, "features": ["a"]}}


def test_schema_is_that_of_the_spec(ninerank: Ninerank) -> None:
    assert json.loads(ninerank("schema").out) == FeatureSpec.model_json_schema()


def test_check_reports_missing_and_unknown_values(ninerank: Ninerank, spec: Path, log: Path, tmp_path: Path) -> None:
    ninerank("fit", spec, log, "--out", tmp_path / "fitted.json")
    found = json.loads(ninerank("check", tmp_path / "fitted.json", log, "--json").out)
    assert found["num_rows"] == 4
    assert found["positive_rate"] == {"click": 0.5}
    features = found["features"]
    assert {name: own["missing_share"] for name, own in features.items()} == {"user": 0.25, "seen": 0.5, "item": 0.0, "price": 0.25}
    assert {name: own["unknown_share"] for name, own in features.items()} == {"user": 0.0, "seen": 1 / 3, "item": 0.25, "price": None}
    assert (features["price"]["min"], features["price"]["max"], features["seen"]["mean_length"]) == (1.0, 3.0, 0.75)
    table = ninerank("check", tmp_path / "fitted.json", log).out
    assert "4 rows" in table
    assert "label click: 50.000% positive" in table


def test_check_of_an_unfitted_spec_says_so(ninerank: Ninerank, spec: Path, log: Path) -> None:
    done = ninerank("check", spec, log, "--rows", "2")
    assert done.code == 0
    assert "2 rows" in done.out
    assert "not fitted" in done.out


def test_synthetic_draws_a_log_and_prints_the_best_auc(ninerank: Ninerank, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"num_users": 50, "num_items": 60, "positive_rate": 0.3, "num_rows": 10}))
    done = ninerank("synthetic", tmp_path / "log", "--config", tmp_path / "config.yaml", "--rows", "2000", "--seed", "3", "--json")
    assert done.code == 0
    truth = json.loads(done.out)
    assert truth == json.loads((tmp_path / "log" / "truth.json").read_text())
    assert (truth["config"]["num_users"], truth["config"]["num_rows"], truth["config"]["seed"]) == (50, 2000, 3)
    table = ninerank("synthetic", tmp_path / "again", "--config", tmp_path / "config.yaml", "--rows", "2000", "--seed", "3")
    assert "Bayes AUC" in table.out
    assert f"{truth['splits']['test']['bayes_auc']:.4f}" in table.out
    assert (tmp_path / "again" / "test.parquet").read_bytes() == (tmp_path / "log" / "test.parquet").read_bytes()


def test_what_synthetic_draws_can_be_fitted_and_checked(ninerank: Ninerank, tmp_path: Path) -> None:
    small = ("--rows", "1000", "--users", "50", "--items", "40")
    assert ninerank("synthetic", tmp_path / "log", *small).code == 0
    assert ninerank("fit", tmp_path / "log" / "spec.yaml", tmp_path / "log" / "train.parquet", "-o", tmp_path / "fitted.json").code == 0
    assert ninerank("check", tmp_path / "fitted.json", tmp_path / "log" / "test.parquet").code == 0


def damaged(name: str, log: Path, spec: Path) -> None:
    """Break the spec or the log in the way `name` says."""
    if name == "label":
        pq.write_table(ROWS.set_column(0, "click", pa.array([1, 0, 2, 1])), log)
    elif name == "column":
        pq.write_table(ROWS.rename_columns(["click", "user", "seen", "item", "prices"]), log)
    elif name == "truncated":
        log.write_bytes(log.read_bytes()[:-20])
    elif name == "empty":
        log.write_bytes(b"")
    elif name == "key":
        spec.write_text(SPEC.replace("dtype", "dtpye"))
    elif name == "yaml":
        spec.write_text("labels: [click\nfeatures: ]")


@pytest.mark.parametrize("verb", ["fit", "check"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("label", "log.parquet: column 'click', row 2: 2.0 is refused; a label is 0 or 1"),
        ("column", "log.parquet: column 'price' is missing; did you mean 'prices'"),
        ("truncated", "log.parquet: cannot be read as Parquet"),
        ("empty", "log.parquet: is empty"),
        ("key", "unknown key 'dtpye'; did you mean 'dtype'"),
        ("yaml", ": is not valid YAML"),
    ],
)
def test_a_mistake_in_a_file_is_one_error(
    verb: str, name: str, said: str, ninerank: Ninerank, spec: Path, log: Path, tmp_path: Path
) -> None:
    damaged(name, log, spec)
    out = tmp_path / "out.json"
    done = ninerank(verb, spec, log, *(["--out", out] if verb == "fit" else []))
    assert done.code == 1
    assert "error: " in done.err
    assert said in done.err
    assert "Traceback" not in done.err
    if name != "yaml":
        assert len(done.err.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "none.yaml"), "none.yaml: cannot be read"),
        (("fit", "{spec}", "none.parquet", "-o", "out.json"), "none.parquet: is not there"),
        (("fit", "{spec}", "{log}", "-o", "{log}/out.json"), "out.json: cannot be written, "),
        (("fit", "{spec}", "{log}", "-o", "out.txt"), "a spec is saved as .json, .yaml or .yml"),
        (("fit", "{spec}", "{log}", "-o", "out.json", "--format", "parket"), "unknown format 'parket'; did you mean 'parquet'"),
        (("synthetic", "out", "--rows", "30"), "at least 20 are needed"),
        (("synthetic", "out", "--config", "none.yaml"), "none.yaml: cannot be read"),
    ],
)
def test_a_wrong_word_is_one_error(
    words: tuple[str, ...], said: str, ninerank: Ninerank, spec: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = ninerank(*(word.format(spec=spec, log=log) for word in words))
    assert done.code == 1
    assert re.fullmatch(f"error: .*{re.escape(said)}.*\n", done.err)


@pytest.mark.parametrize(
    "words", [("fit", "a.yaml"), ("fit", "a.yaml", "b.csv"), ("nothing",), ("fit", "a", "b", "-o", "c.json", "--rows", "0")]
)
def test_wrong_usage_ends_with_two(words: tuple[str, ...], ninerank: Ninerank) -> None:
    assert ninerank(*words).code == 2


def test_the_command_in_a_process_of_its_own_needs_no_torch_to_show_a_spec(spec: Path) -> None:
    program = (
        "import sys\nfrom ninerank.cli.main import main\n"
        f"try:\n    main(['features', 'show', {str(spec)!r}])\n"
        "finally:\n    assert not {'torch', 'numba'} & set(sys.modules), 'heavy imports'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "last 50 of item" in done.stdout
