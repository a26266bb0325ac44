"""Write `src/ninerank/proto/*/*_pb2*.py[i]` from the .proto files: `python scripts/generate_proto.py [--check]`.

The .proto files keep the layout that protobuf tools of other languages expect (`ninerank/v1/predictor.proto`); the
Python code is moved to `ninerank.proto.v1`, so that `ninerank` stays the only top-level import name.

Generated code asks for runtimes at least as new as the grpcio-tools that wrote it, so the committed files are written
with the oldest release that the `serve` extra allows: `pip install grpcio-tools==1.80.0` in an environment of its own.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src" / "ninerank" / "proto"
PACKAGES = {"ninerank.v1": "ninerank.proto.v1", "inference": "ninerank.proto.inference"}


def generate(root: Path = ROOT) -> dict[Path, str]:
    """Text of every generated file, by its place in the package."""
    from grpc_tools import protoc

    sources = sorted(str(path.relative_to(root)) for path in root.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        # A process of its own: protoc run in this one would leave its plugins' state behind between calls.
        command = [sys.executable, "-m", protoc.__name__, f"-I{root}"]
        command += [f"--{kind}_out={directory}" for kind in ("python", "pyi", "grpc_python")]
        subprocess.run([*command, *sources], check=True)
        # Stubs are for clients of our own protocol; the other's clients bring theirs.
        made = (path for path in Path(directory).rglob("*") if path.is_file())
        written = sorted(
            path for path in made if not (path.name.endswith("_grpc.py") and path.is_relative_to(Path(directory) / "inference"))
        )
        # What the package `ninerank` holds moves up into this one.
        places = [Path(str(path.relative_to(directory)).removeprefix("ninerank/")) for path in written]
        return {root / place: _rewrite(path.read_text()) for place, path in zip(places, written, strict=True)}


def _rewrite(text: str) -> str:
    for package, out in PACKAGES.items():
        text = re.sub(rf"^from {re.escape(package)} import", f"from {out} import", text, flags=re.MULTILINE)
        text = re.sub(rf"'{re.escape(package)}\.(\w+_pb2)'", rf"'{out}.\1'", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the Python code of the .proto files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    check = parser.parse_args().check
    files = generate()
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
