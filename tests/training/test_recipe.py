import json
from pathlib import Path

import pytest
import yaml

from ninerank.errors import SpecError
from ninerank.features.sources.synthetic import synthetic_spec
from ninerank.training.recipe import Recipe, apply_override

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def recipe_path(tmp_path, mapping):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def test_yaml_round_trip(recipe_path, tmp_path):
    recipe = Recipe.load(recipe_path)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert Recipe.load(again) == recipe


def test_overrides_reach_every_level_and_are_yaml(recipe_path):
    recipe = Recipe.load(
        recipe_path,
        [
            "schedule.epochs=7",
            "model.mlp.hidden=[32, 16]",
            "schedule.lr={kind: warmup, steps: 5}",
            "spec.features.1.encoding.num_buckets=9",
            "data.test=null",
            "schedule.early_stopping=null",
        ],
    )
    assert recipe.schedule.epochs == 7
    assert recipe.model.mlp.hidden == (32, 16)
    assert recipe.schedule.lr.steps == 5
    assert recipe.spec.feature("item").encoding.num_buckets == 9
    assert recipe.data.test is None
    assert recipe.schedule.early_stopping is None
    assert Recipe.load(recipe_path).override(["seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.epoch=3", r"schedule: unknown key 'epoch'; did you mean 'epochs'\?"),
        ("shedule.epochs=3", r"unknown key 'shedule'; did you mean 'schedule'\?"),
        ("model.mlp.droput=0.1", r"unknown key 'droput'; did you mean 'dropout'\?"),
        ("model.name=deepfn", r"unknown model 'deepfn'; did you mean 'deepfm'\?"),
        ("schedule.epochs=three", "schedule.epochs.*three"),
        ("schedule.epochs=0", "schedule.epochs.*greater than 0"),
        ("schedule.epochs", "no form key=value"),
        ("schedule..epochs=1", "no form key=value"),
        ("seed.deep=3", "seed is .* it has no key 'deep'"),
        ("spec.features.9.name=x", "is a list of 6; '9' is no index"),
        ("spec.features.1.encoding.num_bucket=3", r"did you mean 'num_buckets'\?"),
        ("model={", "not valid YAML"),
        ("optimizer.betas=[0.9, 1.0]", "below 1"),
        ("precision=fp8", "precision"),
    ],
)
def test_wrong_overrides_say_what_is_right(recipe_path, mapping, override, message):
    with pytest.raises(SpecError, match=message):
        Recipe.load(recipe_path, [override, "seed=3"] if not override.startswith("seed.") else ["seed=3", override])


def test_environment_variables_in_data_dir(recipe_path, monkeypatch, log_dir):
    monkeypatch.setenv("NINERANK_DATA", str(log_dir.parent))
    for text in (f"$NINERANK_DATA/{log_dir.name}", f"${{NINERANK_DATA}}/{log_dir.name}"):
        assert Recipe.load(recipe_path, [f"data.dir={text}"]).data.dir == str(log_dir)
    monkeypatch.delenv("NINERANK_DATA")
    with pytest.raises(SpecError, match=r"NINERANK_DATA is not set; set it, or say where the data lie: --set data\.dir="):
        Recipe.load(recipe_path, ["data.dir=$NINERANK_DATA/x"])


def test_absent_data_are_named(recipe_path, tmp_path):
    with pytest.raises(SpecError, match=r"data\.dir: .*nowhere.* is no directory"):
        Recipe.load(recipe_path, [f"data.dir={tmp_path}/nowhere"]).data.files("train")
    with pytest.raises(SpecError, match=r"data\.valid: .*absent\.csv does not exist"):
        Recipe.load(recipe_path, ["data.valid=absent.csv"]).data.files("valid")


def test_several_files_make_a_split(make_recipe):
    assert [path.name for path in make_recipe("data.train=[train.parquet, valid.parquet]").data.files("train")] == [
        "train.parquet",
        "valid.parquet",
    ]
    assert make_recipe("data.test=null").data.files("test") == ()


def test_spec_by_path_lies_beside_the_recipe_or_with_the_data(tmp_path, mapping, log_dir):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(mapping | {"spec": "spec.json"}))
    from_data = Recipe.load(path).spec
    (tmp_path / "spec.json").write_text(json.dumps(mapping["spec"] | {"group": None}))
    assert from_data.group == "user"
    assert Recipe.load(path).spec.group is None
    assert Recipe.load(path, ["spec.weight=null"]).spec.weight is None
    path.write_text(yaml.safe_dump(mapping | {"spec": "spce.json"}))
    with pytest.raises(SpecError, match=r"'spce\.json' is no file; tried .*spce\.json, .*spce\.json"):
        Recipe.load(path)


def test_python_recipes(tmp_path, recipe_path):
    path = tmp_path / "recipe.py"
    path.write_text(f"from ninerank.training.recipe import Recipe\n\n\ndef recipe():\n    return Recipe.load({str(recipe_path)!r})\n")
    assert Recipe.load(path, ["seed=9"]) == Recipe.load(recipe_path, ["seed=9"])
    path.write_text("x = 1\n")
    with pytest.raises(SpecError, match=r"defines no function recipe\(\)"):
        Recipe.load(path)
    with pytest.raises(SpecError, match="cannot be read"):
        Recipe.load(tmp_path / "absent.py")


def test_an_override_may_open_a_section():
    mapping = {"schedule": None}
    apply_override(mapping, "schedule.lr.kind=constant")
    apply_override(mapping, "log.every_steps=5")
    assert mapping == {"schedule": {"lr": {"kind": "constant"}}, "log": {"every_steps": 5}}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_valid_recipe(path, monkeypatch, tmp_path):
    monkeypatch.setenv("NINERANK_DATA", str(tmp_path))
    (tmp_path / "synthetic").mkdir()
    synthetic_spec().save(tmp_path / "synthetic" / "spec.yaml")
    recipe = Recipe.load(path)
    assert recipe.data.dir.startswith(str(tmp_path))
