"""Where a cache is written: a `Depot`, a local directory or an object store, with the same promises from both.

The commit protocol (`commits`) needs three things of a place: objects that are there for good once a call returns, one put
that fails where the name is taken, and a listing. A directory has fsync and the hard link for that, an object store the
conditional put (`stillroom.storage.remote.bucket`).
"""

from __future__ import annotations

import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, TypeGuard, final
from urllib.parse import urlsplit, urlunsplit

from stillroom.storage import strict
from stillroom.storage.errors import InputError
from stillroom.storage.files import put_if_absent, sync_directory, write_durably

_TEMPORARY: Final = re.compile(r"\..+\.tmp")


class Depot(Protocol):
    """A place for one cache. Paths are relative to it, with slashes. Any number of processes may use it at once.

    Every method raises OSError where the disk refuses, and CacheError where a store refuses or keeps failing.

    Attributes:
        root: what `open_cache` takes to read it.
        name: what messages call it; no secrets.
        readers: how many reads at a time are worth while.
    """

    root: Path | str
    name: str
    readers: int

    def prepare(self, *folders: str) -> None:
        """Make sure objects can be put into `folders`."""

    def read_json(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`.

        Raises:
            FileNotFoundError: there is none.
            FormatError: it is no JSON object, or too large for one of ours.
        """

    def names(self, folder: str) -> list[str]:
        """Names in `folder`; none if it is not there."""

    def put_folder(self, folder: str, objects: Iterable[tuple[str, bytes]]) -> None:
        """Put objects by their names under `folder`, which nobody else writes: all are there for good when it returns."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Make `path` hold `data`, whole or not at all, unless something is there; True if this call did.

        A store may also say so where the very same bytes were there already: it can not tell them from its own.
        """

    def replace(self, path: str, data: bytes) -> None:
        """Make `path` hold `data`, whole or not at all, whatever is there."""

    def surely_absent(self, path: str) -> bool:
        """After a put that raised: whether nothing is at `path`, and nothing can still come."""

    def age_s(self, path: str) -> float:
        """Seconds since the file `path`, or what is in the folder `path`, was last written; minus infinity if it is not there."""

    def discard(self, path: str) -> None:
        """Delete the folder or temporary file `path`. What can not be deleted now is left to a later collection."""

    def leavings(self) -> list[str]:
        """Temporary files that a killed writer may have left."""


@final
class Directory:
    """A `Depot` on a local disk, or on a mounted one that has hard links and fsync.

    Args:
        path: of the directory; `prepare` makes it.
    """

    readers = 1

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root: Path | str = Path(path)
        self.name = str(path)
        self._path: Final = Path(path)

    def prepare(self, *folders: str) -> None:
        """As `Depot`."""
        for folder in folders:
            (self._path / folder).mkdir(parents=True, exist_ok=True)

    def read_json(self, path: str) -> dict[str, Any]:
        """As `Depot`."""
        return strict.load_file(self._path / path)

    def names(self, folder: str) -> list[str]:
        """As `Depot`."""
        try:
            return os.listdir(self._path / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def put_folder(self, folder: str, objects: Iterable[tuple[str, bytes]]) -> None:
        """As `Depot`: files first, then the directories that name them, from the inside out."""
        root = self._path / folder
        for name, data in objects:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            write_durably(root / name, data)
        for inner in sorted(root.rglob("*/"), reverse=True):
            sync_directory(inner)
        sync_directory(root)
        sync_directory(root.parent)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """As `Depot`."""
        return put_if_absent(self._path / path, data)

    def replace(self, path: str, data: bytes) -> None:
        """As `Depot`."""
        target = self._path / path
        temporary = target.with_name(f".{target.name}-{secrets.token_hex(8)}.tmp")
        try:
            write_durably(temporary, data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(target.parent)

    def surely_absent(self, path: str) -> bool:
        """As `Depot`."""
        return not (self._path / path).exists()

    def age_s(self, path: str) -> float:
        """As `Depot`, of the file or directory itself."""
        try:
            return time.time() - (self._path / path).lstat().st_mtime
        except FileNotFoundError:  # another writer took it away
            return -math.inf

    def discard(self, path: str) -> None:
        """As `Depot`."""
        target = self._path / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)

    def leavings(self) -> list[str]:
        """As `Depot`."""
        return [
            f"{folder}/{name}"
            for folder in (".", "commits", "derived")
            for name in self.names(folder)
            if _TEMPORARY.fullmatch(name)
        ]


def is_url(path: object) -> TypeGuard[str]:
    """Whether `path` is a URL rather than a path."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def redacted(url: str) -> str:
    """`url` without user, password, query and fragment: fit for errors, logs and file names."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def path_or_url(value: Any) -> Any:
    """A string as a `Path`, unless it is a URL, whose slashes a `Path` would not keep; anything else as it is."""
    return Path(value) if isinstance(value, str) and not is_url(value) else value


def depot_at(where: str | os.PathLike[str] | Depot, *, storage_options: Mapping[str, Any] | None = None) -> Depot:
    """The depot at a path or URL; a depot is passed through.

    Args:
        where: directory, or a URL of an object store: s3://, gs:// or az://.
        storage_options: for a URL: keyword arguments of the store (credentials, endpoint). They appear in no message.

    Raises:
        InputError: a URL of something that has no conditional put, or options for a directory.
    """
    if is_url(where):
        from stillroom.storage.remote.bucket import Bucket

        return Bucket(where, storage_options=storage_options)
    if storage_options is not None:
        raise InputError(f"{where} is a directory, and storage_options are for URLs: drop them")
    return Directory(where) if isinstance(where, str | os.PathLike) else where
