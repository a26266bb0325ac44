"""Two places that run one bundle, compared layer by layer: which operator is the first whose values differ by more than it may.

Both run the golden rows (as many requests, and as one), and random batches. Lookups come first, then every operator of the graph in the
order of its own, matched by the name it had in the bundle: a backend may fuse operators, but the graph it runs says what each stands for.

Of each layer two differences are told. `own` is what the layer itself makes: the second place gets the first one's values to start from,
so that it is its fault alone. `in all` is where both run on their own, with all that went before. What is held to the budget is `own`,
relative to the largest value of the layer, so that a wrong layer is named behind layers that round coarsely; and the scores, absolutely.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from ninerank.errors import BundleError, DataError
from ninerank.evaluation.differences import Difference, difference
from ninerank.evaluation.layerreport import Budget, Layer, LayerReport
from ninerank.evaluation.place import Place, PlacedBundle
from ninerank.features.batch import Batch
from ninerank.features.draw import draw_batch
from ninerank.features.transform import Transform
from ninerank.fusion.backends.copies import stands_for
from ninerank.fusion.kernels import registry
from ninerank.predictor.bundle import Bundle
from ninerank.predictor.engine import raw_ids_of
from ninerank.predictor.rawids import lookup_spec
from ninerank.predictor.request import RequestSchema

__all__ = ["compare_bundle", "compare_places"]

# Rows and requests of the random batches, in turns.
RANDOM_SIZES = ((33, 1), (64, 5))
MAX_LENGTH = 100  # of random histories
LOOKUP = "lookup"


def compare_bundle(
    bundle: Bundle, places: tuple[Place, Place], *, budget: Budget | None = None, num_random: int = 2, seed: int = 0
) -> LayerReport:
    """Run a bundle at both places on its golden rows and `num_random` random batches.

    Raises DeviceError for a place that cannot run here, BundleError for a bundle that is malformed.
    """
    batches = dict(_batches(bundle, num_random, seed))
    return compare_places(bundle, (PlacedBundle(bundle, places[0]), PlacedBundle(bundle, places[1])), batches, budget=budget)


def compare_places(
    bundle: Bundle, sides: tuple[PlacedBundle, PlacedBundle], batches: Mapping[str, Batch], *, budget: Budget | None = None
) -> LayerReport:
    """Compare two sides on batches by name, which lie on the host."""
    first, second = sides
    budget = budget or Budget.of(first.place, second.place)
    table = _Table(budget.layer)
    scores, backends = 0.0, [0.0, 0.0]
    kernels: list[Counter[str]] = [Counter(), Counter()]
    for name, batch in batches.items():
        walks: list[_Walk] = []
        for place, side in enumerate(sides):
            with registry.count_dispatches() as counts:
                walks.append(_Walk(side, side.inputs(batch)))
                backends[place] = max(backends[place], _score_difference(walks[place].logits, side.logits(walks[place].inputs)))
            kernels[place].update({f"{operator}: {kernel}": count for (operator, kernel), count in counts.items()})
        own, other = walks
        scores = max(scores, _score_difference(own.logits, other.logits))
        for given, mine, theirs in zip(second.runner.inputs, own.inputs, other.inputs, strict=True):
            apart = difference(mine, theirs)
            table.add(name, given.name, (LOOKUP, ()), apart, apart)
        forced = _Walk(second, [tensor.to(second.device.torch_device) for tensor in own.inputs], own.values)
        matched = [layer for layer in forced.values if layer in own.values]
        titles = _titles(second.graphs_for(other.inputs)[0], matched)
        for layer in matched:
            value = own.values[layer]
            table.add(name, layer, titles[layer], difference(value, forced.values[layer]), difference(value, other.values[layer]))
    return LayerReport(
        bundle=str(bundle.directory),
        manifest=bundle.manifest,
        places=(first.place.text, second.place.text),
        devices=(first.device.name, second.device.name),
        runs_by=(first.runner.backend, second.runner.backend),
        budget=budget,
        batches=tuple(batches),
        layers=table.layers(),
        scores=scores,
        backends=(backends[0], backends[1]),
        kernels=(dict(kernels[0]), dict(kernels[1])),
    )


def _score_difference(first: Tensor, second: Tensor) -> float:
    scores = (torch.sigmoid(logits.to("cpu", torch.float64)) for logits in (first, second))
    return difference(*scores).absolute


class _Walk(fx.Interpreter):
    """Runs the graph of a side operator by operator. values: what each layer gave, by its name; logits: what came out.

    given: values that take the place of this side's own once these are noted, so that each layer starts from them.
    """

    def __init__(self, side: PlacedBundle, inputs: list[Tensor], given: Mapping[str, Any] | None = None) -> None:
        super().__init__(side.graphs_for(inputs)[1])
        self.inputs, self.values = inputs, dict[str, Any]()
        self._given = given or {}
        with side.running():
            self.logits: Tensor = self.run(*inputs)

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        layer = stands_for(node)
        if node.op == "call_function" and layer is not None and any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0]):
            # The first that gives it: what follows under the same name converts its type.
            self.values.setdefault(layer, value)
            if layer in self._given:
                return tree_map(_like, value, self._given[layer])
        return value


def _like(own: Any, given: Any) -> Any:
    """The given value in the type and place of the own one; the own one where they do not fit."""
    fits = isinstance(own, Tensor) and isinstance(given, Tensor) and own.shape == given.shape
    return given.to(own.device, own.dtype) if fits else own


def _titles(graph: fx.GraphModule, layers: list[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Operator and weights of each layer by the bundle's graph: weights of operators that a backend made part of it are its own."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for layer in layers:
        operators, weights, open_ = [], dict[str, None](), [nodes[layer]]
        while open_:
            node = open_.pop()
            if node.op == "get_attr":
                weights[str(node.target)] = None
            elif node.op == "call_function" and (node.name == layer or node.name not in layers) and node.target not in operators:
                operators.append(node.target)
                open_ += node.all_input_nodes
        found[layer] = (" + ".join(_named(target) for target in reversed(operators)), tuple(weights))
    return found


def _named(target: Any) -> str:
    """`linear` for aten.linear.default."""
    return (
        str(target.overloadpacket).partition(".")[2]
        if isinstance(target, torch._ops.OpOverload)
        else getattr(target, "__name__", str(target))
    )


class _Table:
    """Layers with their differences so far, in the order in which they run in whichever graph has them."""

    def __init__(self, allowed: float) -> None:
        self._allowed = allowed
        self._order: list[str] = []
        self._layers: dict[str, Layer] = {}
        self._batch, self._place = "", 0

    def add(self, batch: str, name: str, title: tuple[str, tuple[str, ...]], own: Difference, in_all: Difference) -> None:
        if batch != self._batch:
            self._batch, self._place = batch, 0
        known = self._layers.get(name)
        if known is None:
            self._order.insert(self._place, name)
            self._layers[name] = Layer(name, *title, own, in_all, batch, self._allowed)
        else:
            where = batch if own.relative > known.own.relative else known.batch
            self._layers[name] = replace(known, own=known.own | own, in_all=known.in_all | in_all, batch=where)
        self._place = self._order.index(name) + 1

    def layers(self) -> tuple[Layer, ...]:
        return tuple(self._layers[name] for name in self._order)


def _batches(bundle: Bundle, num_random: int, seed: int) -> Iterator[tuple[str, Batch]]:
    """Batches on the host, with rows in place of raw ids."""
    transform, raw_ids, rows = Transform(bundle.spec), raw_ids_of(bundle), bundle.golden.rows
    try:
        yield "golden rows", raw_ids.rows(transform.batch(rows, labels=False))
        schema = RequestSchema.of(bundle.spec)
        user, items = rows.select(schema.request.names).slice(0, 1), rows.select(schema.item.names)
        yield "golden request", raw_ids.rows(transform.request(user, items))
    except DataError as error:
        raise BundleError(f"bundle {bundle.directory}: its golden rows cannot be read: {error}") from None
    draw = torch.Generator().manual_seed(seed)
    spec = lookup_spec(bundle.spec, bundle.manifest.dynamic)
    for number in range(num_random):
        num_rows, num_requests = RANDOM_SIZES[number % len(RANDOM_SIZES)]
        yield f"random {number + 1}", draw_batch(spec, num_rows, draw, num_requests=num_requests, longest=MAX_LENGTH)
