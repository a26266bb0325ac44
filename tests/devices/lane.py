"""Everything that can be shown of a device without the device; prints a table and exits with 1 if any line of it is red.

    .venv-ascend/bin/python tests/devices/lane.py npu    Ascend: the real torch_npu over a stand-in of its driver; triton-ascend's adapter
    .venv/bin/python tests/devices/lane.py cuda          NVIDIA: fake tensors, Triton down to cubins for sm_80 and sm_90

`make test-npu` and `make test-cuda-compile` call it. docs/npu.md says what each part proves and what only hardware can.
"""

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "src"))  # this checkout, whatever is installed
CAPABILITIES = (80, 90)
INNER = "NINERANK_LANE_INNER"


@dataclass
class Lane:
    """Results as they come, printed at once."""

    failed: list[str] = field(default_factory=list)
    count: int = 0

    def check(self, part: str, name: str, run: Callable[[], str]) -> None:
        """`run` returns what was seen, or raises; assertion errors speak for themselves."""
        try:
            seen, is_red = run(), False
        except Exception as error:  # noqa: BLE001 - whatever is raised is the result of this line
            text = str(error).strip() or type(error).__name__
            seen, is_red = text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}", True
        self.count += 1
        if is_red:
            self.failed.append(f"{part}: {name}")
        first, *more = seen[:3000].splitlines() or [""]
        print(f"{'RED' if is_red else 'ok':4} {part:10} {name:44} {first}", *(f"     {line}" for line in more), sep="\n", flush=True)


def main(arguments: list[str]) -> int:
    """arguments: `npu`, `cuda`, or `process` (one of two that the lane starts)."""
    if arguments == ["process"]:
        import torch_npu  # noqa: F401
        from presence import process

        process()
        return 0
    if arguments not in (["npu"], ["cuda"]):
        print("error: say npu or cuda", file=sys.stderr)
        return 2
    if INNER not in os.environ:
        return _with_standin() if arguments == ["npu"] else _with_guard()
    warnings.simplefilter("ignore")
    start_s, lane = time.monotonic(), Lane()
    _npu(lane) if arguments == ["npu"] else _cuda(lane)
    verdict = f"all {lane.count} lines are ok"
    if lane.failed:
        verdict = f"{len(lane.failed)} of {lane.count} lines are RED: {'; '.join(lane.failed)}"
    print(f"{verdict} ({time.monotonic() - start_s:.0f} s)")
    return 1 if lane.failed else 0


def _with_standin() -> int:
    """Run this file again where the loader finds the stand-in; it looks when a process starts."""
    from standin import StandinError, build

    found = find_spec("torch_npu")
    if found is None or not found.submodule_search_locations:
        print("error: torch_npu is not installed here: run scripts/ascend.py and take .venv-ascend/bin/python", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            libraries = build(Path(found.submodule_search_locations[0]), Path(folder))
        except StandinError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"{len(libraries)} libraries stand in for the driver", flush=True)
        path = os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH"))))
        own = {"LD_LIBRARY_PATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", INNER: folder}
        return subprocess.run([sys.executable, __file__, "npu"], env={**os.environ, **own}, check=False).returncode


def _with_guard() -> int:
    """Run this file again, where torch has no CUDA with a guard that is loaded before it."""
    import torch
    from guard import build

    own = {INNER: "none"}
    with tempfile.TemporaryDirectory() as folder:
        if torch.version.cuda is None:
            try:
                own["LD_PRELOAD"] = str(build(Path(torch.__file__).parent, Path(folder)))
            except RuntimeError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
        return subprocess.run([sys.executable, __file__, "cuda"], env={**os.environ, **own}, check=False).returncode


def _npu(lane: Lane) -> None:
    import torch_npu  # noqa: F401
    from kernels import all_kernels, unseen_kernels
    from presence import checks
    from steps import graph_mode

    from ninerank.towers.registry import model_names

    _register_missing_shapes()
    for name, check in checks():
        lane.check("present", name, check)
    launches = _traced(lane, "npu")
    for name in model_names():
        lane.check("graph", name, lambda name=name: graph_mode(name))
    lane.check("lowered", "every kernel has a specimen", lambda: _none(unseen_kernels("npu")))
    for specimen in all_kernels("npu", launches.values()):
        lane.check("lowered", specimen.name, lambda specimen=specimen: _lowered(specimen))
    _plant(lane)


def _cuda(lane: Lane) -> None:
    from inductor import kernels_of
    from kernels import all_kernels, cubin, unseen_kernels

    from ninerank.towers.registry import model_names

    launches = _traced(lane, "cuda")
    lane.check("cubin", "every kernel has a specimen", lambda: _none(unseen_kernels("cuda")))
    for specimen in all_kernels("cuda", launches.values()):

        def compiled(specimen: Any = specimen) -> str:
            return ", ".join(f"sm_{capability} {cubin(specimen, capability)}" for capability in CAPABILITIES)

        lane.check("cubin", specimen.name, compiled)
    for name in model_names():
        lane.check("inductor", name, lambda name=name: kernels_of(name))
    for name in ("CopiesToTheHost", "ReadsAValue", "MixesDevices"):
        lane.check("planted", name, lambda name=name: _found("cuda", name))


def _traced(lane: Lane, device_type: str) -> dict[Any, Any]:
    """Trace all steps and forwards; returns the launches that they made."""
    from models import models
    from steps import forward, steps, train

    launches: dict[Any, Any] = {}

    def seen(watch: Any) -> str:
        launches.update(watch.launches)
        assert not watch.findings, "\n".join(watch.findings)
        own = sum(count for name, count in watch.own.items() if "(launch)" in name)
        return f"{sum(watch.operators.values())} calls of {len(watch.operators)} operators, {own} launches, {watch.reads} waits"

    for step in steps():
        lane.check("step", step.name, lambda step=step: seen(train(step, device_type)))
    for name, _ in models():
        lane.check("forward", name, lambda name=name: seen(forward(name, device_type)))
    for dtype in ("fp16", "int8", "int4"):
        lane.check("forward", f"din, tables in {dtype}", lambda dtype=dtype: seen(forward("din", device_type, dtype)))
    return launches


def _lowered(specimen: Any) -> str:
    from ascend_lower import lower
    from linalg import LIMIT_BYTES, narrow_rows, peak_bytes, slow_code

    try:
        linalg = lower(specimen)
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"the adapter refuses it: {error.stderr[-1500:]}") from None
    slow = slow_code(linalg, wide=bool(specimen.constants.get("WIDE")))
    assert not slow, "\n".join(slow)
    peak = peak_bytes(linalg)
    assert peak <= LIMIT_BYTES, f"{peak >> 10} KiB are live at once, {LIMIT_BYTES >> 10} KiB is the limit"
    return f"{peak >> 10:3} KiB live" + (", narrow rows element by element" if narrow_rows(linalg) else "")


def _plant(lane: Lane) -> None:
    from unittest import mock

    import defects
    from kernels import specimens

    for name in ("CopiesToTheHost", "ReadsAValue", "WithoutAKernel", "MixesDevices"):
        lane.check("planted", name, lambda name=name: _found("npu", name))

    def oversized() -> str:
        with defects.oversized_tile():
            specimen = next(specimen for specimen in specimens("npu") if specimen.name.startswith("update-adagrad-fp32-16"))
        with mock.patch("linalg.LIMIT_BYTES", 1 << 30):
            _lowered(specimen)  # nothing else is wrong with it
        try:
            _lowered(specimen)
        except AssertionError as error:
            return f"found: {error}"
        raise AssertionError("not found: a tile eight times as large was let through")

    lane.check("planted", "an oversized tile", oversized)


def _found(device_type: str, defect: str) -> str:
    """A step with the defect in its model has a finding that names the line, and has none where the check for it is switched off."""
    import defects
    from steps import steps, train

    step = next(step for step in steps() if step.name == "dnn")
    findings = train(step, device_type, getattr(defects, defect)).findings
    assert findings, "not found: it was let through"
    assert "defects.py" in findings[0], "\n".join(findings)
    with defects.switched_off(defect):
        others = train(step, device_type, getattr(defects, defect)).findings
    assert not others, f"found by another check than the one for it: {others[0]}"
    return f"found: {findings[0]}"


def _none(names: list[str]) -> str:
    assert not names, f"no specimen in tests/fusion/triton_specimens.py: {', '.join(names)}"
    return "none is left out"


def _register_missing_shapes() -> None:
    """Shapes of results of torch_npu's operators that it gives no meta kernel for."""
    import torch

    def like_input(grad: torch.Tensor, own: torch.Tensor, *rest: object) -> torch.Tensor:
        return torch.empty_like(own)

    torch.library.register_fake("npu::npu_binary_cross_entropy_with_logits_backward")(like_input)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
