"""The manifest of a bundle: which files it has, what each one's bytes hash to, and what made them."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from ninerank.config import Config
from ninerank.errors import BundleError
from ninerank.files import sha256
from ninerank.fusion.compile import PassRecord
from ninerank.fusion.cost import Cost

__all__ = ["MANIFEST", "FileEntry", "Manifest", "check_label", "hash_file"]

MANIFEST = "manifest.json"
FORMAT = 2
MAX_MANIFEST_BYTES = 16 << 20
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# What model and version may look like: they name directories, metrics labels and log columns.
LABEL = r"^[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}$"
Label = Annotated[str, Field(pattern=LABEL)]


class FileEntry(Config):
    """SHA-256 (hex) and size of one file."""

    sha256: Hex
    size_bytes: int = Field(ge=0)


class Manifest(Config):
    """What a bundle says of itself.

    groups: dim of each group of tables. dynamic: number of ids of each dynamic table. tasks: label columns, in the order of the model's
    outputs. precision: of the tables and the graph as trained. table_dtypes: what the tables of a group are stored in (fp32, fp16, int8,
    int4); fp32 where it is not named.
    passes: what the graph compiler did; graph_before, graph_after: what the graph cost for one request before and after.
    golden_difference: largest difference between the bundle's golden scores and the trained model's, seen when it was made.
    golden_tolerance: largest difference at which it still counts as answering as it did then.
    """

    format: int = FORMAT
    model_name: Label
    model_version: Label
    created: str = Field(description="UTC, ISO 8601")
    spec_digest: Hex
    tasks: tuple[str, ...] = Field(min_length=1)
    groups: dict[str, int]
    dynamic: dict[str, int] = Field(default_factory=dict)
    sequence_length: str
    precision: str = "float32"
    table_dtypes: dict[str, str] = Field(default_factory=dict)
    passes: tuple[PassRecord, ...] = ()
    graph_before: Cost = Cost()
    graph_after: Cost = Cost()
    golden_difference: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    golden_tolerance: float = Field(gt=0, allow_inf_nan=False)
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def write(self, directory: Path) -> None:
        """Write `manifest.json` with the digest of its own content."""
        content = self.model_dump(mode="json")
        text = json.dumps({"digest": _digest(content), **content}, indent=1, ensure_ascii=False, allow_nan=False)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest in `directory`; raises BundleError where it is missing, changed, malformed or of another format."""
        file = directory / MANIFEST
        try:
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"{file}: {file.stat().st_size} bytes is too large for a manifest; at most {MAX_MANIFEST_BYTES}")
            content = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{directory}: is no bundle, it has no {MANIFEST}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{file}: cannot be read ({error})") from None
        if not isinstance(content, dict):
            raise BundleError(f"{file}: holds {type(content).__name__} at the top, a mapping is needed")
        if content.get("format") != FORMAT:
            raise BundleError(f"{file}: has bundle format {content.get('format')!r}, this version reads {FORMAT}; export the model again")
        digest = content.pop("digest", None)
        if digest != _digest(content):
            raise BundleError(f"{file}: its content has digest {_digest(content)}, it says {digest!r}; the file was changed")
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise BundleError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        for name in manifest.files:
            if not _PATH.fullmatch(name) or name == MANIFEST:
                raise BundleError(f"{file}: {name!r} is no path of a file inside a bundle")
        return manifest

    def verify(self, directory: Path) -> None:
        """Raise BundleError unless `directory` holds exactly the files listed, each with its size and SHA-256."""
        found = dict(_walk(directory))
        for name in sorted(found.keys() - self.files.keys() - {MANIFEST}):
            raise BundleError(f"{found[name]}: is not listed in the manifest; a bundle holds only what was exported")
        for name, entry in self.files.items():
            if name not in found:
                raise BundleError(f"{directory / name}: is missing from the bundle")
            try:
                actual = hash_file(found[name])
            except OSError as error:
                raise BundleError(f"{found[name]}: cannot be read ({error.strerror})") from None
            if actual.size_bytes != entry.size_bytes:
                raise BundleError(f"{found[name]}: has {actual.size_bytes} bytes, the manifest says {entry.size_bytes}")
            if actual.sha256 != entry.sha256:
                raise BundleError(f"{found[name]}: is corrupt, SHA-256 {actual.sha256}, the manifest says {entry.sha256}")


def check_label(what: str, value: str) -> None:
    """Raise BundleError unless `value` can be a model's name or version."""
    if not re.fullmatch(LABEL, value):
        raise BundleError(f"{what} {value!r}: at most 100 letters, digits and _ . + - are allowed, the first a letter or digit")


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file."""
    return FileEntry(sha256=sha256(path), size_bytes=path.stat().st_size)


def _walk(directory: Path) -> Iterator[tuple[str, Path]]:
    """Every file below, as (path relative to `directory`, path); links and special files are refused."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise BundleError(f"{path}: is a link or a special file; a bundle holds plain files")
        if path.is_file():
            yield path.relative_to(directory).as_posix(), path


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
