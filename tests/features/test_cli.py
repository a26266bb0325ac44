"""`ninerank features` as a person uses it: exit codes, what is written, one line for an error."""

import json
from pathlib import Path

import pytest

from ninerank.cli.main import main
from ninerank.features.spec import FeatureSpec

SPEC = """
labels: [click]
features:
  - {name: user, kind: id, role: user}
  - {name: price, kind: numeric, role: item, transform: {kind: standardise}}
"""
ROWS = "click,user,price\n1,ann,1.5\n0,bob,2.5\n0,ann,\n"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "log.csv").write_text(ROWS)
    return tmp_path


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["features", *map(str, words)])
    return int(stop.value.code or 0)


def test_fit_show_and_check(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = here / "fitted.json"
    assert run("fit", here / "spec.yaml", here / "log.csv", "--out", fitted) == 0
    spec = FeatureSpec.load(fitted)
    assert spec.is_fitted
    assert spec.tables["user"].num_rows == 3
    assert spec.digest in capsys.readouterr().out

    assert run("show", fitted, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["digest"] == spec.digest
    assert shown["tables"] == {"user": {"num_rows": 3, "features": ["user"]}}

    assert run("check", fitted, here / "log.csv", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_rows"] == 3
    assert found["features"]["user"]["unknown_share"] == 0.0
    assert found["features"]["price"]["missing_share"] == pytest.approx(1 / 3)

    assert run("check", here / "spec.yaml", here / "log.csv") == 0
    assert "not fitted" in capsys.readouterr().out


def test_fit_on_the_first_rows(here: Path) -> None:
    assert run("fit", here / "spec.yaml", here / "log.csv", "--out", here / "first.yaml", "--rows", 1) == 0
    assert FeatureSpec.load(here / "first.yaml").tables["user"].num_rows == 2


def test_the_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"labels", "features"} <= set(schema["required"])


def test_synthetic_writes_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synthetic", tmp_path / "log", "--rows", 3000, "--users", 50, "--items", 60, "--seed", 3, "--json") == 0
    truth = json.loads(capsys.readouterr().out)
    assert truth["config"]["seed"] == 3
    assert sum(split["num_rows"] for split in truth["splits"].values()) == 3000
    assert run("check", tmp_path / "log" / "spec.yaml", tmp_path / "log" / "test.parquet") == 0


def test_settings_of_a_file_are_overridden_by_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text("num_rows: 9000\nnum_users: 20\nnum_items: 40\n")
    assert run("synthetic", tmp_path / "log", "--config", tmp_path / "small.yaml", "--rows", 2000, "--json") == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["num_rows"], config["num_users"]) == (2000, 20)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("check", "{}/spec.yaml", "{}/bad.csv"), "bad.csv: column 'click', row 1: 3.0 is refused; a label is 0 or 1"),
        (("show", "{}/absent.yaml"), "absent.yaml: cannot be read"),
        (("show", "{}/typo.yaml"), "unknown key 'label'; did you mean 'labels'?"),
        (("fit", "{}/spec.yaml", "{}/log.csv", "--out", "{}/out.txt"), "a spec is saved as .json, .yaml or .yml"),
        (("check", "{}/spec.yaml", "{}/log.csv", "--format", "cvs"), "unknown format 'cvs'; did you mean 'csv'?"),
        (("synthetic", "{}/log", "--items", "3"), "at least twice candidates_per_request"),
    ],
)
def test_an_error_is_one_line(words: tuple[str, ...], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.csv").write_text(ROWS.replace("0,bob", "3,bob"))
    (here / "typo.yaml").write_text(SPEC.replace("labels", "label"))
    assert run(*(word.format(here) for word in words)) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_wrong_usage_exits_with_2() -> None:
    assert run("synthetic") == 2
