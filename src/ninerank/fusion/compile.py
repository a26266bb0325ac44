"""The graph compiler: a captured graph in, one with the same scores and less work out.

    source -> passes, round after round until none fires -> compiled graph, and a record of what each pass did

Every result is compared with the source (`verify`) and weighed (`cost`); a pass that is wrong, or that does not pay, is withdrawn and
the record says why. Passes that prepare others are weighed together with those. Graphs with operators that no pass knows stay as
they are there: what is not understood is not touched.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pydantic import Field
from torch import Tensor, fx

from ninerank.config import Config
from ninerank.fusion.cost import Cost, measure
from ninerank.fusion.editor import Editor
from ninerank.fusion.passes import PASSES, Pass
from ninerank.fusion.single import single_request
from ninerank.fusion.verify import Verifier

__all__ = ["SINGLE", "CompiledGraph", "PassError", "PassRecord", "compile_graph", "graph_for_one"]

MAX_ROUNDS = 8
SINGLE = "single_request"

log = logging.getLogger(__name__)


class PassError(AssertionError):
    """A pass changed scores, or failed: a defect of ours, raised in tests."""


class PassRecord(Config):
    """What one pass did in one round, or (round 0) that it found nothing to do; at the end that `single_request` was checked.

    fired: places changed. withdrawn: whether the change was taken back, and why. before, after: cost of the graph for one request;
    where the change was taken back, `after` is what it would have been, or the same where that is unknown. difference: largest
    difference of a score from the exact one. milliseconds: that the pass took, checks included.
    """

    name: str
    round: int = Field(ge=0)
    fired: int = Field(default=0, ge=0)
    withdrawn: bool = False
    why: str = ""
    before: Cost = Cost()
    after: Cost = Cost()
    difference: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    milliseconds: float = Field(default=0.0, ge=0)


@dataclass(frozen=True)
class CompiledGraph:
    """module: the graph for any number of requests and rows; see `single_request` for one request. records: in the order of trial."""

    module: fx.GraphModule
    records: tuple[PassRecord, ...]
    before: Cost
    after: Cost

    @property
    def fired(self) -> dict[str, int]:
        """How often each pass fired and was kept; `single_request`, which makes another graph, left out."""
        counts: dict[str, int] = {}
        for record in self.records:
            if record.fired and not record.withdrawn and record.name != SINGLE:
                counts[record.name] = counts.get(record.name, 0) + record.fired
        return counts


def compile_graph(
    module: fx.GraphModule,
    examples: Sequence[Mapping[str, Tensor]] = (),
    *,
    passes: Sequence[Pass] = PASSES,
    must_pay: bool = True,
    raise_wrong: bool = False,
) -> CompiledGraph:
    """Compile a graph that `capture` made.

    examples: golden batches by input name, checked besides random ones. must_pay: withdraw what the cost model says costs more.
    raise_wrong: raise PassError where a pass fails or changes scores, as tests want it; else it is withdrawn and logged.
    """
    try:
        compiler = _Compiler(module, examples, passes, must_pay=must_pay, raise_wrong=raise_wrong)
        cost = _cost(module)
    except Exception as error:
        if raise_wrong:
            raise
        why = f"the graph cannot be analysed: {_told(error)}"
        log.warning("%s; it stays as it is", why)
        return CompiledGraph(module, tuple(PassRecord(name=own.name, round=0, why=why) for own in passes), Cost(), Cost())
    return compiler.run(cost)


def graph_for_one(module: fx.GraphModule, records: Sequence[PassRecord]) -> fx.GraphModule:
    """The graph to run for one request: `single_request` where the records say that it was right, else the graph itself."""
    is_right = any(record.name == SINGLE and not record.withdrawn for record in records)
    return single_request(module) if is_right else module


class _Compiler:
    def __init__(
        self,
        module: fx.GraphModule,
        examples: Sequence[Mapping[str, Tensor]],
        passes: Sequence[Pass],
        *,
        must_pay: bool,
        raise_wrong: bool,
    ) -> None:
        self.source = module
        self.verifier = Verifier(module, examples)
        self.passes = tuple(passes)
        self.must_pay, self.raise_wrong = must_pay, raise_wrong
        self.records: list[PassRecord] = []

    def run(self, before: Cost) -> CompiledGraph:
        module = self.source
        editor: Editor | None = None
        cost, withdrawn = before, set[str]()
        for round_ in range(1, MAX_ROUNDS + 1):
            changed = False
            for own in self.passes:
                if own.name in withdrawn:
                    continue
                start = time.perf_counter()
                editor = editor or Editor(module)
                tried, fired, why = self._try(own, editor, module)
                if not fired and not why:
                    continue
                editor = None
                after = cost if why else _cost(tried)
                difference = 0.0
                if not why:
                    difference, why = self._checked(partial(_itself, tried))
                if not why and self.must_pay:
                    active = [other for other in self.passes if other.name not in withdrawn]
                    why = _price(own, active, (module, tried), (cost, after))
                if why:
                    withdrawn.add(own.name)
                self.records.append(
                    PassRecord(
                        name=own.name,
                        round=round_,
                        fired=fired,
                        withdrawn=bool(why),
                        why=why,
                        before=cost,
                        after=after,
                        difference=difference,
                        milliseconds=round((time.perf_counter() - start) * 1e3, 3),
                    )
                )
                if not why:
                    module, cost, changed = tried, after, True
            if not changed:
                break
        self._finish(module, cost)
        known = {record.name for record in self.records}
        self.records += [
            PassRecord(name=own.name, round=0, why="nothing to do", before=cost, after=cost) for own in self.passes if own.name not in known
        ]
        return CompiledGraph(module, tuple(self.records), before, cost)

    def _finish(self, module: fx.GraphModule, cost: Cost) -> None:
        """Check the variant for one request, which costs are counted for."""
        start = time.perf_counter()
        difference, why = self._checked(partial(single_request, module), one_request=True)
        milliseconds = round((time.perf_counter() - start) * 1e3, 3)
        self.records.append(
            PassRecord(
                name=SINGLE,
                round=1,
                fired=1,
                withdrawn=bool(why),
                why=why,
                before=measure(module),
                after=cost,
                difference=difference,
                milliseconds=milliseconds,
            )
        )

    def _try(self, own: Pass, editor: Editor, module: fx.GraphModule) -> tuple[fx.GraphModule, int, str]:
        """The graph after one pass, how often it fired, and what went wrong."""
        try:
            fired = own.apply(editor)
            return (editor.done() if fired else module), fired, ""
        except Exception as error:
            if self.raise_wrong:
                raise PassError(f"pass {own.name} failed: {type(error).__name__}: {error}") from error
            log.warning("pass %s failed and is left out (%s: %s)", own.name, type(error).__name__, error)
            return module, 0, f"failed: {_told(error)}"

    def _checked(self, make: Callable[[], fx.GraphModule], *, one_request: bool = False) -> tuple[float, str]:
        """Largest difference from exact scores, and what is wrong with it."""
        try:
            difference = self.verifier.difference(make(), one_request=one_request)
        except Exception as error:  # noqa: BLE001 - a graph that is wrong may fail in any way
            difference, why = 0.0, f"its graph fails: {_told(error)}"
        else:
            why = (
                ""
                if difference <= self.verifier.allowed
                else f"scores differ by {difference:.3g}, at most {self.verifier.allowed:.3g} is allowed"
            )
            if difference == float("inf"):
                difference, why = 0.0, "its scores are of another shape, or no numbers"
        if why and self.raise_wrong:
            raise PassError(f"wrong pass: {why}")
        if why:
            log.warning("a pass is withdrawn: %s", why)
        return difference, why


def _itself(module: fx.GraphModule) -> fx.GraphModule:
    return module


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _price(own: Pass, active: Sequence[Pass], graphs: tuple[fx.GraphModule, fx.GraphModule], costs: tuple[Cost, Cost]) -> str:
    """Why the second graph does not pay; empty where it does. active: passes that may still follow."""
    before, after = costs
    if own.prepares:
        others = [other for other in active if other is not own]
        before, after = _cost(_rewritten(graphs[0], others)), _cost(_rewritten(graphs[1], active))
    if after.modelled_us <= before.modelled_us * (1 + 1e-9):
        return ""
    return f"does not pay: {before.modelled_us:.1f} us without it, {after.modelled_us:.1f} us with it"


def _rewritten(module: fx.GraphModule, passes: Sequence[Pass]) -> fx.GraphModule:
    """What passes make of a graph, unchecked."""
    editor = Editor(module)
    for _ in range(MAX_ROUNDS):
        if not sum(own.apply(editor) for own in passes):
            break
    return editor.done()


def _cost(module: fx.GraphModule) -> Cost:
    return measure(single_request(module))
