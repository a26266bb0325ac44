"""What `ninerank doctor` looks at: packages against their bounds, devices and drivers, compilers, Redis.

Each probe returns plain values and adds a `Problem` for whatever is wrong, with the line that mends it.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ninerank.errors import DeviceError

__all__ = ["Findings", "Problem", "compilers", "devices", "drivers", "packages", "redis", "requirements"]

REDIS_TIMEOUT_S = 0.25
PROBE_TIMEOUT_S = 60.0
USES = {
    "": "everything",
    "cpu": "TorchRec embedding on CPU",
    "cuda": "TorchRec embedding on GPU",
    "npu": "running on Ascend NPU",
    "serve": "`ninerank serve` and the client",
    "report": "plots and TensorBoard",
}
# Two distributions that install one import name break each other.
RIVALS = (("fbgemm-gpu", "fbgemm-gpu-cpu"), ("triton", "triton-ascend"))
# Native packages that may be installed and still not load: a build for another torch, another CUDA, another libstdc++.
NATIVE = {"fbgemm-gpu": "fbgemm_gpu", "fbgemm-gpu-cpu": "fbgemm_gpu", "torchrec": "torchrec"}


@dataclass(frozen=True)
class Problem:
    """Something missing or wrong. mend: the line to type. fatal: what was asked for cannot run."""

    what: str
    mend: str
    fatal: bool = False


@dataclass
class Findings:
    """What the probes saw, by section, and what is wrong."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(problem.fatal for problem in self.problems)


def requirements(extra: str) -> list[Requirement]:
    """What the installed package asks for on this platform and Python with `extra` ("" for the base)."""
    everything = [Requirement(line) for line in metadata.requires("ninerank") or []]
    return [item for item in everything if _extra(item) == extra and (item.marker is None or item.marker.evaluate({"extra": extra}))]


def _extra(item: Requirement) -> str:
    found = re.search(r"extra == \"([\w-]+)\"", str(item.marker))
    return found[1] if found else ""


def packages(findings: Findings, kind: str) -> None:
    """Installed versions against the package's own bounds, for the base, the extra of `kind` and those of serving and reports."""
    table: dict[str, Any] = {}
    findings.sections["packages"] = table
    try:
        wanted = [(extra, item) for extra in ("", kind, "serve", "report") for item in requirements(extra)]
        if kind != "cuda":  # these extras cannot name it: its own requirements ask for the CUDA build of fbgemm
            wanted += [(kind, item) for item in requirements("cuda") if item.name == "torchrec"]
    except metadata.PackageNotFoundError:
        findings.problems.append(Problem("the package ninerank itself is not installed (it runs from source)", "pip install -e ."))
        return
    for extra, item in wanted:
        have = _version(item.name)
        fits = have is not None and item.specifier.contains(have, prereleases=True)
        table[item.name] = {"version": have, "wanted": str(item.specifier), "ok": fits}
        if not fits:
            state = "is not installed" if have is None else f"is {have}, {item.specifier} is wanted"
            options = "--no-deps " if item.name == "torchrec" and kind != "cuda" else ""
            item.marker = None
            findings.problems.append(Problem(f"{item.name} {state} (for {USES[extra]})", f"pip install {options}'{item}'", fatal=not extra))
    for first, second in RIVALS:
        if _version(first) is not None and _version(second) is not None:
            mend = f"pip uninstall -y {first} {second} && make setup DEVICE={kind}"
            findings.problems.append(Problem(f"{first} and {second} install the same module and overwrite each other", mend))
    _load_native(findings, table)


def devices(findings: Findings, spec: str) -> None:
    """Which kinds of device run here and why not; a fatal problem where the one asked for does not."""
    table: dict[str, Any] = {}
    findings.sections["devices"] = table
    try:
        from ninerank.device import KINDS, Device, missing
    except Exception as error:  # noqa: BLE001 - a broken torch fails to import with almost any type
        findings.problems.append(
            Problem(f"torch does not load: {_first_line(error)}", "pip install --force-reinstall 'torch>=2.13,<2.14'", fatal=True)
        )
        return
    for kind in KINDS:
        problem = missing(kind)
        table[kind] = {"ok": problem is None, "why_not": problem and problem.what, "mend": problem and problem.mend}
    asked = table.get(spec.partition(":")[0])
    if asked is not None and not asked["ok"]:
        findings.problems.append(Problem(f"device {spec!r}: {asked['why_not']}", asked["mend"], fatal=True))
        return
    try:
        chosen = Device.resolve(spec)
        memory = chosen.memory()
        chosen.synchronize()
    except DeviceError as error:
        findings.problems.append(Problem(str(error), "name a device of the list above, or auto", fatal=True))
        return
    except Exception as error:  # noqa: BLE001 - a driver that lists a device and then fails to run it
        findings.problems.append(Problem(f"device {spec!r}: {_first_line(error)}", "see the driver's own log, then try again", fatal=True))
        return
    findings.sections["chosen"] = {
        "name": chosen.name,
        "collectives": chosen.backend,
        "autocast": str(chosen.autocast_dtype).removeprefix("torch.") if chosen.autocast_dtype else None,
        "memory_total_gib": round(memory.total_bytes / 2**30, 1),
        "reason": chosen.reason,
    }


def drivers(findings: Findings) -> None:
    """Drivers and toolkits of the accelerators, as their own tools name them."""
    table: dict[str, Any] = {}
    if shutil.which("nvidia-smi"):
        table["nvidia"] = _ask("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if shutil.which("npu-smi"):
        table["ascend"] = _ask("npu-smi", "-v")
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    places = [Path(home)] if home else [Path("/usr/local/Ascend/ascend-toolkit/latest")]
    for place in places:
        if place.is_dir():
            table["cann"] = str(place.resolve())
    findings.sections["drivers"] = table


def compilers(findings: Findings) -> None:
    """gcc and g++, which torch.compile and Triton call."""
    table: dict[str, Any] = {}
    for name in ("gcc", "g++"):
        path = shutil.which(name)
        table[name] = (_ask(path, "--version") or "?").splitlines()[0] if path else None
        if path is None:
            mend = "xcode-select --install" if sys.platform == "darwin" else f"apt-get install {name}   (or your system's package of it)"
            findings.problems.append(Problem(f"no {name}: torch.compile and Triton cannot build kernels", mend))
    findings.sections["compilers"] = table


def redis(findings: Findings, url: str) -> None:
    """One PING to `url`, waiting at most a quarter of a second for each step."""
    shown = _without_password(url)
    table: dict[str, Any] = {"url": shown, "ok": False}
    findings.sections["redis"] = table
    try:
        import redis as client
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError:
        findings.problems.append(Problem("the Redis client is not installed", "pip install 'redis[hiredis]>=5.2'", fatal=True))
        return
    once = Retry(NoBackoff(), 0)
    start_s = time.perf_counter()
    try:
        connection = client.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S, retry=once)
        connection.ping()
        table["ms"] = round((time.perf_counter() - start_s) * 1e3, 2)
        table["version"] = str(connection.info("server")["redis_version"])
        table["ok"] = True
    except (client.RedisError, OSError, ValueError) as error:
        mend = "start redis-server, or pass the URL of one that runs: --redis redis://HOST:6379/0"
        findings.problems.append(Problem(f"Redis at {shown} does not answer: {_first_line(error)}", mend, fatal=True))


def _load_native(findings: Findings, table: dict[str, Any], preload: str = "torch") -> None:
    """Import the native packages in one process of their own: one that was built for another torch may abort and not just raise."""
    present = {name: module for name, module in NATIVE.items() if table.get(name, {}).get("version")}
    while present:
        steps = "".join(f"print({name!r}, flush=True); import {module}\n" for name, module in present.items())
        outcome = _run(sys.executable, "-c", f"import {preload}\n{steps}")
        begun = outcome.stdout.split() if outcome is not None else []
        sound = outcome is not None and outcome.returncode == 0
        for name in begun if sound else begun[:-1]:
            table[name]["loads"] = True
            del present[name]
        if sound:
            return
        if not begun:  # torch itself, which `devices` tells about
            return
        culprit = begun[-1]
        table[culprit]["loads"] = False
        del present[culprit]
        reason = (outcome.stderr.strip().splitlines() or [f"exit code {outcome.returncode}"])[-1] if outcome else "no answer"
        findings.problems.append(
            Problem(f"{culprit} is installed but does not load: {reason}", "make setup   (wheels that belong together)")
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _ask(*command: str) -> str | None:
    outcome = _run(*command)
    return outcome.stdout.strip() if outcome is not None and outcome.returncode == 0 else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _without_password(url: str) -> str:
    """The URL as it may be printed.

    >>> _without_password("redis://:secret@host:6379/0")
    'redis://***@host:6379/0'
    """
    return re.sub(r"//[^/]*@", "//***@", url)
