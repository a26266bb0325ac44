"""Drawings of captured graphs: boxes in layers, coloured by role, inputs at the top and the score at the bottom.

Layers are longest paths; an edge over several layers bends through a place of its own in each, and places are ordered by the mean of
their neighbours (Sugiyama, Tagawa and Toda, Methods for Visual Understanding of Hierarchical System Structures, 1981).
Weights and `user_row` are left out; a box says what it reads when pointed at.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from statistics import fmean

from torch import Tensor, fx

from ninerank.fusion.editor import Editor
from ninerank.fusion.roles import USER_ROW, expanded

__all__ = ["LEGEND", "graph_svg"]

BOX_WIDTH, BOX_HEIGHT, GAP, LAYER_HEIGHT, BEND_WIDTH, MARGIN = 124, 36, 14, 62, 16, 12
SWEEPS = 12
SMALLEST = 0.62  # a wide drawing shrinks as far as this to fit the page, then it scrolls
LEGEND = {"request": "request: once a request", "item": "item: once a candidate", "joint": "joint: both sides meet"}


@dataclass
class _Place:
    """A box, or (without a node) where an edge passes a layer."""

    layer: int
    node: fx.Node | None = None
    above: list["_Place"] = field(default_factory=list)
    below: list["_Place"] = field(default_factory=list)
    x: float = 0.0

    @property
    def width(self) -> int:
        return BEND_WIDTH if self.node is None else BOX_WIDTH

    @property
    def y(self) -> float:
        return MARGIN + self.layer * LAYER_HEIGHT


def graph_svg(module: fx.GraphModule, label: str) -> str:
    """SVG of a captured graph. label: what it is, for whoever cannot see it."""
    editor = Editor(module)
    layers, edges = _laid_out(editor)
    width = max((sum(p.width + GAP for p in layer) for layer in layers), default=0) + 2 * MARGIN
    height = len(layers) * LAYER_HEIGHT - (LAYER_HEIGHT - BOX_HEIGHT) + 2 * MARGIN
    _space(layers, width)
    lines = "".join(f'<path class="edge" d="{_path(edge)}"/>' for edge in edges)
    boxes = "".join(_box(editor, place, place.node) for layer in layers for place in layer if place.node is not None)
    return (
        f'<svg class="graph" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'style="width:min({width}px, max(100%, {round(width * SMALLEST)}px))">{lines}{boxes}</svg>'
    )


def _drawn(editor: Editor) -> list[fx.Node]:
    nodes = [node for node in editor.graph.nodes if node.op in ("placeholder", "call_function") and node.meta["role"] != "constant"]
    return [node for node in nodes if node.op != "placeholder" or node.meta["input"].name != USER_ROW]


def _laid_out(editor: Editor) -> tuple[list[list[_Place]], list[list[_Place]]]:
    """Places by layer, in order, and every edge as the places it goes through."""
    nodes = _drawn(editor)
    known = set(nodes)
    depth: dict[fx.Node, int] = {}
    for node in nodes:
        depth[node] = max((depth[other] + 1 for other in node.all_input_nodes if other in known), default=0)
    for node in nodes:  # an input stands just above who reads it first
        if node.op == "placeholder":
            depth[node] = max(0, min((depth[user] for user in node.users if user in known), default=1) - 1)
    places = {node: _Place(depth[node], node) for node in nodes}
    layers: list[list[_Place]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for place in places.values():
        layers[place.layer].append(place)
    edges = []
    for node in nodes:
        for other in node.all_input_nodes:
            if other in known:
                edges.append(_edge(places[other], places[node], layers))
    for sweep in range(SWEEPS):
        _order(layers, down=sweep % 2 == 0)
    return layers, edges


def _edge(start: _Place, end: _Place, layers: list[list[_Place]]) -> list[_Place]:
    bends = [_Place(layer) for layer in range(start.layer + 1, end.layer)]
    for bend in bends:
        layers[bend.layer].append(bend)
    path = [start, *bends, end]
    for upper, lower in pairwise(path):
        upper.below.append(lower)
        lower.above.append(upper)
    return path


def _order(layers: list[list[_Place]], *, down: bool) -> None:
    for layer in layers:
        for rank, place in enumerate(layer):
            place.x = rank / max(len(layer) - 1, 1)
    for layer in layers if down else reversed(layers):
        mean = {id(p): fmean(q.x for q in near) if (near := p.above if down else p.below) else p.x for p in layer}
        layer.sort(key=lambda place: mean[id(place)])
        for rank, place in enumerate(layer):
            place.x = rank / max(len(layer) - 1, 1)


def _space(layers: list[list[_Place]], width: float) -> None:
    """Real places: in order, not closer than they are wide, near their neighbours."""
    for layer in layers:
        start = (width - sum(p.width + GAP for p in layer) + GAP) / 2
        for place in layer:
            place.x = start + place.width / 2
            start += place.width + GAP
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = [fmean(q.x for q in near) if (near := p.above if sweep % 2 == 0 else p.below) else p.x for p in layer]
            _settle(layer, wanted, width)


def _settle(layer: list[_Place], wanted: list[float], width: float) -> None:
    edge = float(MARGIN)
    for place, x in zip(layer, wanted, strict=True):
        place.x = max(x, edge + place.width / 2)
        edge = place.x + place.width / 2 + GAP
    edge = width - MARGIN
    for place in reversed(layer):
        place.x = min(place.x, edge - place.width / 2)
        edge = place.x - place.width / 2 - GAP


def _path(edge: list[_Place]) -> str:
    start = edge[0]
    x, y = start.x, start.y + BOX_HEIGHT
    text = f"M{x:.0f} {y:.0f}"
    for place in edge[1:]:
        middle = (y + place.y) / 2
        text += f"C{x:.0f} {middle:.0f} {place.x:.0f} {middle:.0f} {place.x:.0f} {place.y:.0f}"
        x, y = place.x, place.y
        if place is not edge[-1]:
            y += BOX_HEIGHT
            text += f"L{x:.0f} {y:.0f}"
    return text


def _box(editor: Editor, place: _Place, node: fx.Node) -> str:
    left, top = place.x - BOX_WIDTH / 2, place.y
    kind = "input" if node.op == "placeholder" else "bridge" if expanded(node) is not None else "call"
    name, size = _name(node), _sizes(editor, node)
    return (
        f'<g class="node {node.meta["role"]} {kind}"><title>{escape(_details(editor, node))}</title>'
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="{14 if kind == "input" else 5}"/>'
        f'<text x="{place.x:.0f}" y="{top + 15:.0f}" text-anchor="middle">{escape(name)}</text>'
        f'<text class="size" x="{place.x:.0f}" y="{top + 29:.0f}" text-anchor="middle">{escape(size)}</text></g>'
    )


def _name(node: fx.Node) -> str:
    if node.op == "placeholder":
        name = str(node.meta["input"].name)
        return name if len(name) <= 20 else f"{name[:9]}…{name[-9:]}"
    return "repeat rows" if expanded(node) is not None else str(node.target).split(".")[1] if "." in str(node.target) else node.name


def _sizes(editor: Editor, node: fx.Node) -> str:
    names = {size: name.removeprefix("L.") for name, size in editor.sizes.items()}
    return " × ".join(names.get(size, str(size)) for size in editor.shape(node))


def _details(editor: Editor, node: fx.Node) -> str:
    reads: dict[str, list[str]] = defaultdict(list)
    for other in node.all_input_nodes:
        value = other.meta["val"]
        shape = "×".join(map(str, value.shape)) if isinstance(value, Tensor) and other.op == "get_attr" else _sizes(editor, other)
        reads["weights" if other.op == "get_attr" else "values"].append(
            f"{other.target if other.op == 'get_attr' else _name(other)} ({shape})"
        )
    parts = [f"{node.target if node.op == 'call_function' else 'input'}: {_sizes(editor, node)}, {node.meta['role']}"]
    return "\n".join([*parts, *(f"{what}: {', '.join(given)}" for what, given in reads.items())])
