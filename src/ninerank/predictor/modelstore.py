"""Where model versions come from: a directory, or an object store that is copied to one.

    <root>/<model>/<version>/manifest.json ...     a bundle
    <root>/<model>/<version>.deltas/               changes of its embedding rows (see `livedelta`)
    <root>/<model>/policy.yaml                     which version answers

A version is there once its manifest is: bundles are renamed into place, and copied to an object store with the manifest last.
"""

import re
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.fs as pa_fs

from ninerank.errors import BundleError
from ninerank.files import creating
from ninerank.predictor.manifest import LABEL, MANIFEST, Manifest

__all__ = ["DirectoryStore", "ModelStore", "ObjectStore", "open_store", "version_order"]

POLICY = "policy.yaml"
DELTAS = ".deltas"
MAX_FILE_BYTES = 1 << 40


class ModelStore(Protocol):
    """Models and their versions, looked at again and again."""

    def models(self) -> list[str]:
        """Names of the models that have a version."""

    def versions(self, model: str) -> dict[str, str]:
        """Versions of a model, each with what changes if the version is written anew."""

    def fetch(self, model: str, version: str) -> Path:
        """A directory that holds the bundle. Raises BundleError."""

    def policy(self, model: str) -> Path | None:
        """The model's policy as a file, if there is one."""

    def deltas(self, model: str, version: str) -> Path | None:
        """Directory of the version's deltas, if there is one."""


def version_order(version: str) -> tuple[tuple[int, int | str], ...]:
    """Key by which versions rise: numbers in them count as numbers.

    >>> sorted(["10", "9", "2026-01-02", "9.1"], key=version_order)
    ['9', '9.1', '10', '2026-01-02']
    """
    parts = re.findall(r"\d+|\D+", version)
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts)


class DirectoryStore:
    """A directory on this machine, or one that is mounted."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise BundleError(f"{self.root}: is no directory of models")

    def models(self) -> list[str]:
        """See ModelStore."""
        return [path.name for path in sorted(self.root.iterdir()) if _is_label(path.name) and path.is_dir() and self.versions(path.name)]

    def versions(self, model: str) -> dict[str, str]:
        """See ModelStore."""
        found = {}
        for path in sorted((self.root / model).iterdir()) if (self.root / model).is_dir() else ():
            if _is_label(path.name) and not path.name.endswith(DELTAS):
                try:
                    stat = (path / MANIFEST).stat()
                except OSError:
                    continue
                found[path.name] = f"{stat.st_mtime_ns}-{stat.st_size}-{stat.st_ino}"
        return found

    def fetch(self, model: str, version: str) -> Path:
        """See ModelStore."""
        return self.root / model / version

    def policy(self, model: str) -> Path | None:
        """See ModelStore."""
        path = self.root / model / POLICY
        return path if path.is_file() else None

    def deltas(self, model: str, version: str) -> Path | None:
        """See ModelStore."""
        path = self.root / model / f"{version}{DELTAS}"
        return path if path.is_dir() else None


class ObjectStore:
    """What pyarrow can open by a URI (s3://, gs://, hdfs://, file://), copied version by version to `local`.

    Only the files that a manifest names are copied, under names that stay inside the copy; the copy appears when it is whole.
    """

    def __init__(self, uri: str, local: str | Path) -> None:
        try:
            self._fs, self._root = pa_fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise BundleError(f"{uri}: cannot be opened as a store of models ({error})") from None
        self._uri = uri
        self.local = Path(local)
        self.local.mkdir(parents=True, exist_ok=True)

    def models(self) -> list[str]:
        """See ModelStore."""
        return [name for name in self._names(self._root) if self.versions(name)]

    def versions(self, model: str) -> dict[str, str]:
        """See ModelStore."""
        names = [name for name in self._names(f"{self._root}/{model}") if not name.endswith(DELTAS)]
        found = {}
        for name in names:
            info = self._info(f"{self._root}/{model}/{name}/{MANIFEST}")
            if info.type == pa_fs.FileType.File:
                found[name] = f"{info.mtime_ns}-{info.size}"
        return found

    def fetch(self, model: str, version: str) -> Path:
        """See ModelStore."""
        info = self._info(f"{self._root}/{model}/{version}/{MANIFEST}")
        target = self.local / model / f"{version}-{info.mtime_ns}"
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with creating(target) as directory:
            self._copy(model, version, MANIFEST, directory)
            for name in Manifest.read(directory).files:  # which refuses names that lead out of the bundle
                (directory / name).parent.mkdir(exist_ok=True)
                self._copy(model, version, name, directory)
        return target

    def policy(self, model: str) -> Path | None:
        """See ModelStore."""
        path = f"{self._root}/{model}/{POLICY}"
        info = self._info(path)
        if info.type != pa_fs.FileType.File:
            return None
        target = self.local / model / f"policy-{info.mtime_ns}.yaml"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._fs.open_input_stream(path) as source:
                target.write_bytes(source.read(1 << 20))
        return target

    def deltas(self, model: str, version: str) -> Path | None:
        """See ModelStore. Deltas are followed in a directory that is mounted, and not in an object store."""
        return None

    def _copy(self, model: str, version: str, name: str, directory: Path) -> None:
        path = f"{self._root}/{model}/{version}/{name}"
        try:
            with self._fs.open_input_stream(path) as source, (directory / name).open("wb") as target:
                while block := source.read(8 << 20):
                    target.write(block)
        except (pa.ArrowException, OSError) as error:
            raise BundleError(f"{self._uri}: {path} cannot be copied ({error})") from None

    def _info(self, path: str) -> pa_fs.FileInfo:
        return self._fs.get_file_info(path)

    def _names(self, path: str) -> list[str]:
        found = self._fs.get_file_info(pa_fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == pa_fs.FileType.Directory and _is_label(info.base_name))


def open_store(place: str | Path, local: str | Path | None = None) -> ModelStore:
    """Store at a path or a URI. local: where versions of an object store are copied to. Raises BundleError."""
    if "://" in str(place):
        if local is None:
            raise BundleError(f"{place}: an object store needs a local folder for copies")
        return ObjectStore(str(place), local)
    return DirectoryStore(place)


def _is_label(name: str) -> bool:
    return re.fullmatch(LABEL, name) is not None
