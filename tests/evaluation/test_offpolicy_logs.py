"""Decision logs: mapped columns, target policies by name, the command line, and the Open Bandit sample."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from ninerank.cli.main import main
from ninerank.errors import DataError, SpecError
from ninerank.evaluation.offpolicy import estimate
from ninerank.evaluation.offpolicy.logs import JOINED, OPEN_BANDIT, DecisionColumns, read_decisions
from ninerank.evaluation.offpolicy.targets import Target, lists_for, question_of


def written(path: Path, seed: int, rows: int, chance: list[float]) -> Path:
    rng = np.random.default_rng(seed)
    item = rng.choice(3, rows, p=chance)
    table = pa.table(
        {
            "clicked": (rng.random(rows) < np.array([0.1, 0.2, 0.4])[item]).astype(np.int8),
            "shown": item,
            "p": np.array(chance)[item],
            "place": rng.integers(0, 2, rows),
            "session": [f"s{n // 3}" for n in range(rows)],
            "new_p": np.array([0.2, 0.2, 0.6])[item],
        }
    )
    (pc.write_csv if path.suffix == ".csv" else pq.write_table)(table, path)
    return path


COLUMNS = DecisionColumns(reward="clicked", action="shown", propensity="p", context="place", cluster="session")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_policies_are_valued_from_mapped_columns(tmp_path: Path, suffix: str) -> None:
    log = written(tmp_path / f"a{suffix}", 1, 6000, [0.5, 0.3, 0.2])
    other = written(tmp_path / f"b{suffix}", 2, 6000, [0.1, 0.1, 0.8])
    truth = {"logging": 0.19, "uniform": 0.7 / 3, f"log:{other}": 0.35, "column:new_p": 0.3}
    for policy, value in truth.items():
        target = Target.parse(policy)
        rows = read_decisions(log, COLUMNS, target.of if target.kind == "column" else None)
        asked = question_of(rows, target, COLUMNS)
        found = estimate(asked.feedback)
        assert found.diagnostics.clusters == 2000
        assert ("dr" in found.estimates) == (target.kind in ("uniform", "log"))
        for own in found.estimates.values():
            assert own.value == pytest.approx(value, abs=0.03)
        assert (asked.unsupported_N is not None) == (target.kind in ("uniform", "log"))
        assert len(asked.caveats) == (target.kind == "log")
    assert read_decisions([log, other], COLUMNS).reward_N.shape == (12_000,)


def test_actions_outside_the_log_are_counted(tmp_path: Path) -> None:
    log, other = written(tmp_path / "a.csv", 1, 500, [0.6, 0.4, 0.0]), written(tmp_path / "b.csv", 2, 500, [0.0, 0.5, 0.5])
    asked = question_of(read_decisions(log, COLUMNS), Target.parse(f"log:{other}"), COLUMNS)
    assert asked.unsupported_N is not None
    np.testing.assert_allclose(asked.unsupported_N.mean(), 0.5, atol=0.05)


def test_wrong_logs_are_refused(tmp_path: Path) -> None:
    log = written(tmp_path / "a.csv", 1, 50, [0.5, 0.3, 0.2])
    with pytest.raises(DataError, match=r"column 'pp' is missing \(.*\); log with each decision"):
        read_decisions(log, COLUMNS.model_copy(update={"propensity": "pp"}))
    with pytest.raises(DataError, match="no propensity column is named.*log with each decision"):
        read_decisions(log, COLUMNS.model_copy(update={"propensity": None}))
    with pytest.raises(DataError, match="column 'click' is missing .did you mean 'clicked'"):
        read_decisions(log, COLUMNS.model_copy(update={"reward": "click"}))
    with pytest.raises(DataError, match="policy 'best': logging, uniform, log:PATH or column:NAME"):
        Target.parse("best")
    with pytest.raises(DataError, match="policy 'log:'"):
        Target.parse("log:")
    without = read_decisions(log, COLUMNS.model_copy(update={"action": None}))
    with pytest.raises(DataError, match="needs an action column"):
        question_of(without, Target.parse("uniform"), COLUMNS)
    with pytest.raises(SpecError, match="unknown key 'rewards'"):
        DecisionColumns.parse({"rewards": "x"}, "columns")
    (tmp_path / "n.csv").write_text("clicked,shown,p,place,session\n1,2,,0,s\n")
    with pytest.raises(DataError, match="column 'p' has 1 nulls"):
        read_decisions(tmp_path / "n.csv", COLUMNS)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["-q", "offpolicy", *words])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = written(tmp_path / "a.csv", 1, 3000, [0.5, 0.3, 0.2])
    (tmp_path / "columns.yaml").write_text("reward: clicked\naction: shown\npropensity: p\ncluster: session\n")
    words = (str(log), "--columns", str(tmp_path / "columns.yaml"), "--policy", "uniform")
    code, printed, _ = run(capsys, *words, "--out", str(tmp_path / "out.json"))
    assert code == 0
    assert "value of policy uniform" in printed
    assert "3,000 decisions in 1,000 clusters" in printed
    code, printed, _ = run(capsys, *words, "--json", "--no-model")
    found = json.loads(printed)
    assert sorted(found["estimates"]) == ["clipped_ips", "ips", "snips"]
    assert found["estimates"]["ips"]["low"] < 0.7 / 3 < found["estimates"]["ips"]["high"]
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["estimates"]["ips"] == found["estimates"]["ips"]
    code, _, said = run(capsys, str(log), "--format", "openbandit")
    assert code == 1
    assert "column 'propensity_score' is missing" in said
    assert said.count("\n") == 1
    code, _, said = run(capsys, str(log), "--format", "open_bandit")
    assert "did you mean 'openbandit'" in said


def joined_log(folder: Path) -> Path:
    """Lists of 3 as `ninerank join` writes them: partitioned by date, places from 0, item 2 better than 1 than 0."""
    rng = np.random.default_rng(5)
    for day in ("2026-01-01", "2026-01-02"):
        item = rng.choice(3, (800, 3), p=[0.5, 0.3, 0.2])
        (folder / f"date={day}").mkdir(parents=True)
        table = {
            "request_id": np.repeat([f"{day}-{n}" for n in range(800)], 3),
            "candidate_id": item.ravel().astype(str),
            "position": np.tile([0, 1, 2], 800),
            "propensity": np.array([0.5, 0.3, 0.2])[item].ravel(),
            "buy": (rng.random(2400) < np.array([0.1, 0.2, 0.4])[item].ravel()).astype(np.int8),
            "p_new": np.array([0.2, 0.2, 0.6])[item].ravel(),
        }
        pq.write_table(pa.table(table), folder / f"date={day}" / "part-0.parquet")
    return folder


def test_joined_logs_are_read_by_row_and_by_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = joined_log(tmp_path / "joined")
    words = (str(log), "--format", "joined", "--reward", "buy", "--policy", "column:p_new", "--json")
    _, printed, _ = run(capsys, *words)
    by_row = json.loads(printed)
    assert by_row["diagnostics"]["decisions"] == 4800
    assert by_row["diagnostics"]["clusters"] == 1600
    assert by_row["estimates"]["ips"]["low"] < 0.3 < by_row["estimates"]["ips"]["high"]
    for kind, names in {"place": ("item_position", "pseudo_inverse"), "given-above": ("independent", "cascade", "standard")}.items():
        _, printed, _ = run(capsys, *words, "--lists", kind)
        found = json.loads(printed)
        assert found["lists"] == 1600
        for name in names:
            assert found["estimates"][name]["low"] < 0.9 < found["estimates"][name]["high"], name
    code, printed, _ = run(capsys, *words[:-1], "--lists", "place", "--out", str(tmp_path / "lists.json"))
    assert "reward of a list under policy column:p_new, 1,600 lists" in " ".join(printed.split())
    assert json.loads((tmp_path / "lists.json").read_text())["lists"] == 1600
    for more, message in (
        (("--lists", "places"), "did you mean 'place'"),
        (("--lists", "place", "--policy", "uniform"), "policy 'uniform' of lists: logging or column:NAME"),
        (("--columns", "x.yaml"), "names the columns itself"),
    ):
        code, _, said = run(capsys, *words, *more)
        assert code == 1
        assert message in said
    rows = read_decisions(log, JOINED.model_copy(update={"reward": "buy", "list": None}))
    with pytest.raises(DataError, match="lists need the columns `list`"):
        lists_for(rows, Target.parse("logging"))


def test_a_log_with_some_propensities_says_what_to_log(tmp_path: Path) -> None:
    pq.write_table(pa.table({"click": [1, 0], "candidate_id": ["a", "b"], "propensity": [0.5, None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'propensity' has 1 nulls.*log with each decision"):
        read_decisions(tmp_path, DecisionColumns(reward="click", action="candidate_id"))


def test_open_bandit_sample(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random, bts = data_dir / "obd_men" / "random" / "men.csv", data_dir / "obd_men" / "bts" / "men.csv"
    if not random.is_file():
        pytest.skip("NINERANK_DATA has no obd_men")
    rows = read_decisions(random, OPEN_BANDIT)
    own = estimate(question_of(rows, Target.parse("logging"), OPEN_BANDIT).feedback)
    assert own.estimates["ips"].value == rows.reward_N.mean()
    on_policy = read_decisions(bts, OPEN_BANDIT).reward_N.mean()
    code, printed, _ = run(capsys, str(random), "--format", "openbandit", "--policy", f"log:{bts}", "--json")
    assert code == 0
    found = json.loads(printed)
    for name in ("ips", "snips", "dr", "sndr", "switch_dr"):
        assert found["estimates"][name]["low"] < on_policy < found["estimates"][name]["high"], name
    assert any("decisions have a reward that counts" in line for line in found["diagnostics"]["warnings"])
    assert "error of these shares is not in the intervals" in found["caveats"][0]
    assert 1000 < found["diagnostics"]["effective_size"] < 5000
