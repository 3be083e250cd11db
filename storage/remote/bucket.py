"""A `Depot` in an object store: objects put with retries, and the conditional put on which the commit protocol rests.

A request whose answer got lost is made again, so a conditional put may find the name taken by itself. Then the bytes that
are there decide: a commit record names its attempt, a name nobody else has, so equal bytes are our own.
"""

from __future__ import annotations

import datetime
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, final

from stillroom.storage import strict
from stillroom.storage.depot import redacted
from stillroom.storage.errors import CacheError, FormatError, InputError
from stillroom.storage.remote.place import asked, open_store
from stillroom.storage.remote.retry import DEFAULT_RETRY, RetryPolicy

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONDITIONAL: Final = ("s3", "s3a", "gs", "az", "abfs", "abfss", "memory")
PART_BYTES: Final = 8 << 20  # a larger object goes in parts of this size ...
_PARTS_AT_ONCE: Final = 4  # ... so many at a time
_NOT_IMPLEMENTED: Final = re.compile(r"NotImplemented|501 Not Implemented")
_REMEDY: Final = "write to a local directory and copy that, or choose a store that has them (S3, GCS, Azure)"


@final
class Bucket:
    """A `Depot` behind an s3://, gs:// or az:// URL, through obstore. Safe to use from threads; not to carry over a fork.

    Args:
        url: of the cache: store, bucket and prefix.
        storage_options: keyword arguments of the store, credentials for example; they appear in no message.
        retry: how failed requests are repeated.
        store: an obstore store to use in place of the one the URL names (`MemoryStore`).

    Raises:
        InputError: no conditional put there, a malformed URL, or obstore is not installed.
    """

    readers = 16

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
        store: Any = None,
    ) -> None:
        self.name = redacted(url).rstrip("/")
        self.root: Path | str = url.rstrip("/")
        scheme = url.partition("://")[0].lower()
        if scheme not in CONDITIONAL or (scheme == "memory" and store is None):
            raise InputError(f"{self.name} came as the place to write a cache, wanted s3://, gs:// or az://: {_REMEDY}")
        opened, prefix = open_store(url, dict(storage_options or {})) if store is None else (store, "")
        self._store: Final = opened
        self._prefix: Final = f"{prefix}/" if prefix else ""
        self._retry: Final = DEFAULT_RETRY if retry is None else retry
        self._conditional = False  # until the store has refused a put

    def prepare(self, *folders: str) -> None:
        """As `Depot`: a store has no folders."""

    def read_json(self, path: str) -> dict[str, Any]:
        """As `Depot`."""
        return self._retried(lambda: self._get_json(path), path, "read")

    def names(self, folder: str) -> list[str]:
        """As `Depot`."""
        prefix = f"{self._prefix}{folder}/"
        found = self._retried(lambda: self._store.list_with_delimiter(prefix), folder, "listed")
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def put_folder(self, folder: str, objects: Iterable[tuple[str, bytes]]) -> None:
        """As `Depot`: one put an object, in parts where it is large. A store acknowledges what it will keep."""
        for name, data in objects:
            self.replace(f"{folder}/{name}", data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """As `Depot`. After an error it may have been put all the same.

        Raises:
            CacheError: the store kept failing, or puts regardless of the condition.
        """

        def ask() -> bool:
            if self._create(path, data):
                return True
            try:
                return self._holds(path, data)  # ours, if an answer got lost
            except FileNotFoundError:
                raise ConnectionError("refused, but nothing is there: another put was under way") from None

        made: bool = self._retried(ask, path, "written")
        if made and not self._conditional and self._retried(lambda: self._create(path, data), path, "written"):
            raise self._unconditional(f"it took a second put of {path}")
        return made

    def replace(self, path: str, data: bytes) -> None:
        """As `Depot`."""

        def ask() -> None:
            self._store.put(self._prefix + path, data, chunk_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

        self._retried(ask, path, "written")

    def surely_absent(self, path: str) -> bool:
        """As `Depot`: never, as a put whose answer did not come may still arrive."""
        return False

    def age_s(self, path: str) -> float:
        """As `Depot`, by the clocks of the store and of this machine."""
        touched = [item["last_modified"] for item in self._under(path)]
        if not touched:
            return -math.inf
        age: datetime.timedelta = datetime.datetime.now(datetime.UTC) - max(touched)
        return age.total_seconds()

    def discard(self, path: str) -> None:
        """As `Depot`."""
        try:
            if paths := [item["path"] for item in self._under(path)]:
                self._retried(lambda: self._delete(paths), path, "deleted")
        except CacheError as error:
            logger.warning("%s/%s is left to be collected in a day: %s", self.name, path, error)

    def leavings(self) -> list[str]:
        """As `Depot`: none that can be seen. Parts of a killed multipart upload are for a lifecycle rule of the bucket."""
        return []

    def _create(self, path: str, data: bytes) -> bool:
        """The conditional put itself; False where the name is taken, or the store can not tell."""
        try:
            self._store.put(self._prefix + path, data, mode="create", use_multipart=False)
        except Exception as error:
            kind = type(error).__name__
            if kind in ("AlreadyExistsError", "PreconditionError"):
                self._conditional = True
                return False
            if kind == "NotSupportedError" or _NOT_IMPLEMENTED.search(str(error)):
                raise self._unconditional("it does not understand one") from None
            raise
        return True

    def _unconditional(self, why: str) -> CacheError:
        return CacheError(
            f"{self.name} can not be written to, as its store has no conditional put ({why}), without which writers replace each "
            f"other's records: {_REMEDY}"
        )

    def _holds(self, path: str, data: bytes) -> bool:
        found = self._store.get(self._prefix + path)
        return found.meta["size"] == len(data) and bytes(found.bytes()) == data

    def _get_json(self, path: str) -> dict[str, Any]:
        found = self._store.get(self._prefix + path)
        if found.meta["size"] > strict.MAX_JSON_BYTES:
            raise FormatError(
                f"{path} holds {found.meta['size']:,} bytes, wanted at most {strict.MAX_JSON_BYTES:,}: it is not one of ours"
            )
        return strict.loads(bytes(found.bytes()), path)

    def _delete(self, paths: list[str]) -> None:
        try:
            self._store.delete(paths)
        except FileNotFoundError:  # another writer is at it
            for path in paths:
                try:
                    self._store.delete(path)
                except FileNotFoundError:
                    continue

    def _under(self, path: str) -> list[Mapping[str, Any]]:
        prefix = f"{self._prefix}{path}/"
        return self._retried(lambda: [item for page in self._store.list(prefix) for item in page], path, "listed")

    def _retried(self, ask: Callable[[], T], path: str, done: str) -> T:
        return asked(ask, policy=self._retry, what=f"{self.name}/{path}", done=done)
