"""The main job, end to end, on a synthetic log whose best possible AUC is known: `make demo` runs this.

    log -> train -> evaluate -> export -> serve -> rank -> replay

Every step is a `ninerank` command that is printed before it runs, so that each can be tried by hand afterwards.
Exit code 0 only if the model comes within 0.01 of the Bayes AUC and the replayed scores agree within 1e-6.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

AUC_GAP = 0.01
SCORE_TOLERANCE = 1e-6
START_TIMEOUT_S = 120


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory of the demo; what an earlier demo left there is replaced")
    parser.add_argument("--rows", type=int, help="rows of the synthetic log (default: the source's own)")
    arguments = parser.parse_args()
    started = time.monotonic()
    out: Path = arguments.out
    run, bundle, served, report = out / "run", out / "bundle", out / "request_log", out / "report.html"
    _clear(out)

    _title("1. A log drawn from a known truth")
    _ninerank("features", "synthetic", out / "log", *(["--rows", str(arguments.rows)] if arguments.rows else []))
    _title("2. Train DeepFM")
    recipe = Path(__file__).with_name("synthetic_deepfm.yaml")
    _ninerank("train", recipe, "--set", f"data.dir={(out / 'log').resolve()}", "--out", run)
    _title("3. Evaluate, with a report page")
    _ninerank("-q", "evaluate", run, out / "log" / "test.parquet", "--report", report)
    _title("4. Export a bundle")
    _ninerank("-q", "export", run, "--out", bundle)
    _title("5. Serve it, rank one request")
    with _Server(bundle, out / "log" / "items.parquet", served) as server:
        request = out / "request.json"
        request.write_text(_ninerank("rank", "--example", bundle, quiet=True), encoding="utf-8")
        _ninerank("rank", "--target", server.target, "--request", request)
    _title("6. Replay the served log")
    replayed = json.loads(_ninerank("-q", "replay", served, "--bundle", bundle, "--tolerance", str(SCORE_TOLERANCE), "--json", quiet=True))

    auc = json.loads((run / "metrics.json").read_text())["test"]["auc"]
    bayes_auc = json.loads((out / "log" / "truth.json").read_text())["splits"]["test"]["bayes_auc"]
    largest, scores = replayed["largest_difference"], replayed["candidates"]
    _title("Summary")
    print(f"test AUC               {auc:.4f}")
    print(f"Bayes AUC              {bayes_auc:.4f}   (no model can do better; distance {bayes_auc - auc:.4f}, allowed {AUC_GAP})")
    print(f"replay                 {scores} scores, largest difference {largest:.1e}, allowed {SCORE_TOLERANCE:.0e}")
    print(f"report page            {report.resolve()}")
    print(f"bundle                 {bundle.resolve()}")
    print(f"time                   {time.monotonic() - started:.0f} s")
    good = bayes_auc - auc <= AUC_GAP and largest <= SCORE_TOLERANCE and scores > 0
    print("\nAll as it should be." if good else "\nNOT as it should be: see the figures above.")
    return 0 if good else 1


class _Server:
    """`ninerank serve` as a process; `target` is where it answers."""

    def __init__(self, bundle: Path, items: Path, served: Path) -> None:
        self.command = _command("-q", "serve", bundle, "--port", "0", "--items", items, "--log", served)

    def __enter__(self) -> "_Server":
        self._process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(line, end="")
            if line.startswith("serving "):
                self.target = line.rsplit(" at ", 1)[1].strip()
                return self
        raise SystemExit(f"the server ended before it answered (exit code {self._process.wait()})")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(START_TIMEOUT_S)
        finally:
            self._process.kill()


def _clear(out: Path) -> None:
    """Empty the demo's directory; one that holds anything else is refused."""
    marker = out / ".ninerank-demo"
    if out.exists():
        if any(out.iterdir()) and not marker.exists():
            raise SystemExit(f"{out}: holds something that is no earlier demo; choose another place with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    marker.touch()


def _command(*words: object) -> list[str]:
    shown = shlex.join(["ninerank", *(os.path.relpath(w) if isinstance(w, Path) else str(w) for w in words)])
    print(f"$ {shown}", flush=True)
    return [sys.executable, "-m", "ninerank", *map(str, words)]


def _ninerank(*words: object, quiet: bool = False) -> str:
    """Run one command; ends the demo with its exit code where it fails. quiet: give back what it prints, and show nothing."""
    done = subprocess.run(_command(*words), check=False, text=True, stdout=subprocess.PIPE if quiet else None)
    if done.returncode:
        if quiet:
            print(done.stdout)
        raise SystemExit(done.returncode)
    return done.stdout or ""


def _title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
