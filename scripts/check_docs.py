"""Check the documents: `python scripts/check_docs.py [FILE.md ...]` (default: those at the root, in docs/, examples/ and deploy/).

Links within the repository must lead to a file, and to a heading where they name one; Python, YAML and JSON blocks must parse;
commands in shell blocks that begin with `ninerank` must name a verb that is there.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from ninerank.cli.main import VERBS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "examples", "deploy")
FENCE = re.compile(r"^(?P<mark>```+|~~~+) *(?P<language>[\w-]*)[^\n]*\n(?P<body>.*?)^(?P=mark) *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)[^)]*\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
COMMAND = re.compile(r"^\s*(?:\$ )?(?:[\w./]*/)?ninerank +(?P<verb>[a-z]\w*)", re.MULTILINE)


def documents(root: Path = ROOT) -> list[Path]:
    """Markdown files that are meant to be read."""
    return sorted([*root.glob("*.md"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.md"))])


def check(path: Path, root: Path = ROOT) -> Iterator[str]:
    """One line for each fault of the document at `path`."""
    text = path.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    for match in LINK.finditer(prose):
        fault = _check_link(path, match["target"], root)
        if fault:
            yield fault
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        fault = _check_block(match["language"], match["body"])
        if fault:
            yield f"line {line}: {fault}"


def _check_link(path: Path, target: str, root: Path) -> str | None:
    if re.match(r"[a-z][a-z+.-]*:", target):  # elsewhere: not ours to check, and tests run without internet
        return None
    place, _, anchor = target.partition("#")
    file = (path.parent / place).resolve() if place else path
    if not file.exists():
        return f"link {target!r}: no such file"
    if not file.is_relative_to(root.resolve()):
        return f"link {target!r}: leads out of the repository"
    if anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
        return f"link {target!r}: no such heading"
    return None


def _check_block(language: str, body: str) -> str | None:
    try:
        if language in {"python", "py"} and ">>>" not in body:
            ast.parse(body)
        elif language in {"yaml", "yml"}:
            list(yaml.safe_load_all(body))
        elif language == "json":
            json.loads(body)
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        return f"{language} block does not parse: {error}"
    if language in {"bash", "sh", "shell", "console"}:
        unknown = sorted({match["verb"] for match in COMMAND.finditer(body)} - set(VERBS))
        if unknown:
            return f"no such verb of ninerank: {', '.join(unknown)}"
    return None


def anchors(text: str) -> set[str]:
    """Names by which links reach the headings of a document.

    >>> sorted(anchors("# The way of the data\\n## `spec.py`, twice\\n"))
    ['specpy-twice', 'the-way-of-the-data']
    """
    titles = HEADING.findall(FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).strip().lower().replace(" ", "-") for title in titles}


def main(names: list[str]) -> int:
    """Print every fault; the exit code is 1 if there is one."""
    paths = [Path(name).resolve() for name in names] or documents()
    faults = [f"{path.relative_to(ROOT)}: {fault}" for path in paths for fault in check(path)]
    print("\n".join(faults) if faults else f"{len(paths)} documents: links and code blocks are sound")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
