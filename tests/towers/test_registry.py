import copy
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ninerank.config import Config
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import SpecError
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import FeatureSpec, Hashed, IdFeature, NumericFeature, SequenceFeature
from ninerank.towers.config import ModelConfig, parse_model
from ninerank.towers.model import SequenceShape, TowerShape
from ninerank.towers.registry import build_model, model_names

NAMES = model_names()
FEATURES: tuple[Any, ...] = (
    SequenceFeature(name="history", role="user", of="item", max_length=4),
    IdFeature(name="user", role="user", encoding=Hashed(num_buckets=9)),
    IdFeature(name="item", role="item", encoding=Hashed(num_buckets=9)),
    IdFeature(name="tags", role="item", encoding=Hashed(num_buckets=5), multi=True),
    NumericFeature(name="price", role="item"),
)
SPEC = FeatureSpec(labels=("click", "buy"), features=FEATURES)


def batch(requests: int, rows: int) -> Batch:
    draw = torch.Generator().manual_seed(0)

    def ids(keys: tuple[str, ...], count: int, high: int, jagged: bool) -> KeyedJagged:
        lengths = torch.randint(0, 4, (len(keys) * count,), generator=draw) if jagged else None
        total = len(keys) * count if lengths is None else int(lengths.sum())
        return KeyedJagged(keys, torch.randint(0, high, (total,), generator=draw), lengths, count)

    request = Block(
        ids(("user",), requests, 10, False), ids((), requests, 1, True), ids(("history",), requests, 10, True), torch.zeros(requests, 0)
    )
    item = Block(
        ids(("item",), rows, 10, False), ids(("tags",), rows, 6, True), ids((), rows, 1, True), torch.randn(rows, 1, generator=draw)
    )
    return Batch(request, item, None if requests == rows else torch.arange(rows) % requests)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_takes_every_kind_of_feature(name: str, mode: str) -> None:
    model = build_model(parse_model({"name": name}), SPEC, EmbeddingConfig.parse({"mode": mode}, "embedding"), seed=1).train()
    for requests in (6, 2):
        logits = model(batch(requests, 6))
        assert logits.shape == (6, 2)
        logits.sum().backward()
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_need_no_values_when_shapes_are_static(name: str, mode: str) -> None:
    """On the meta device nothing can be read back: no hidden copy to the host, no shape that depends on data."""
    meta = torch.device("meta")
    with meta:
        config = EmbeddingConfig.parse({"mode": mode, "sequence_length": "max"}, "embedding")
        model = build_model(parse_model({"name": name}), SPEC, config, seed=1).train()
    for requests in (6, 2):
        logits = model(batch(requests, 6).to(meta))
        logits.sum().backward()
        assert logits.shape == (6, 2)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("din", "fibinet")])
def test_a_spec_of_numbers_alone_is_enough(name: str, mode: str) -> None:
    spec = FeatureSpec(labels=("click",), features=FEATURES[-1:])
    model = build_model(parse_model({"name": name}), spec, EmbeddingConfig.parse({"mode": mode}, "embedding"), seed=1)
    none = KeyedJagged((), torch.zeros(0, dtype=torch.int64), None, 4)
    logits = model(Batch(Block(none, none, none, torch.zeros(4, 0)), Block(none, none, none, torch.randn(4, 1))))
    logits.sum().backward()
    assert logits.shape == (4, 1)


def test_the_tower_in_the_documentation_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    none = KeyedJagged((), torch.zeros(0, dtype=torch.int64), None, 3)

    def block(key: str) -> Block:
        return Block(KeyedJagged((key,), torch.arange(3), None, 3), none, none, torch.zeros(3, 0))

    assert names["model"](Batch(block("user"), block("item"))).shape == (3, 1)


@pytest.mark.parametrize("name", NAMES)
def test_tower_compiles_as_one_graph(name: str) -> None:
    model = build_model(parse_model({"name": name}), SPEC, EmbeddingConfig(), seed=1).train()
    inputs = {key: value.detach() for key, value in model.embedding(batch(6, 6)).items()}
    reference = copy.deepcopy(model.tower)
    torch.testing.assert_close(torch.compile(model.tower, backend="eager", fullgraph=True)(inputs), reference(inputs))


@pytest.mark.parametrize("name", NAMES)
def test_start_values_depend_on_the_seed_alone(name: str) -> None:
    def state(seed: int, junk: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(junk)
        before = torch.get_rng_state()
        model = build_model(parse_model({"name": name}), SPEC, EmbeddingConfig(), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.state_dict()

    one, two, other = state(1, 5), state(1, 6), state(2, 5)
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert any(not torch.equal(value, other[key]) for key, value in one.items() if key.startswith("embedding."))
    if name != "lr":
        assert any(not torch.equal(value, other[key]) for key, value in one.items() if key.startswith("tower."))


def test_shape_of_a_spec() -> None:
    assert TowerShape.of(SPEC) == TowerShape(num_fields=3, num_dense=1, sequences=(SequenceShape("history", 1),), num_tasks=2)


def test_unknown_models_and_keys_are_refused_with_the_nearest() -> None:
    class Recipe(Config):
        model: ModelConfig

    for parse in (parse_model, lambda data: Recipe.parse({"model": data}, "recipe")):
        with pytest.raises(SpecError, match=r"unknown model 'deepfn'; did you mean 'deepfm'.*valid: autoint, dcnv2, .*ple, xdeepfm"):
            parse({"name": "deepfn"})
        with pytest.raises(SpecError, match="unknown key 'hiden'; did you mean 'hidden'"):
            parse({"name": "dnn", "mlp": {"hiden": [1]}})
        for bad in ({}, {"name": ["dnn"]}, "dnn", None, {"name": "dnn", "mlp": {"dropout": 1.0}}, {"name": "fm", "embedding_dim": 0}):
            with pytest.raises(SpecError):
                parse(bad)
    for mending in ({}, {"low_rank": 4}):
        parsed = {"name": "dcnv2", "experts": 4, **mending}
        with nullcontext() if mending else pytest.raises(SpecError, match="experts: 4 needs low_rank"):
            assert parse_model(parsed).name == "dcnv2"
    assert Recipe.parse({"model": {"name": "fm", "embedding_dim": 3}}, "recipe").model == parse_model({"name": "fm", "embedding_dim": 3})
