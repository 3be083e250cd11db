"""A URL and the file system behind it: reading objects and ranges with retries, naming it without its secrets."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, final
from urllib.parse import urlsplit

from stillroom.storage import strict
from stillroom.storage.depot import redacted
from stillroom.storage.errors import CacheError, InputError, StillroomError
from stillroom.storage.remote.retry import RetryPolicy, with_retries

T = TypeVar("T")

_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_BY_OBSTORE: Final = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
_NO_RETRIES: Final = {"max_retries": 0}  # ours are counted and waited for in one place
_EXTRA: Final = "pip install 'stillroom[remote]'"
_obstore_pid: int | None = None  # the process whose threads serve obstore; a fork has none of them


@final
class Place:
    """A folder behind a URL. Safe to use from threads, to pickle, and to carry over a fork.

    Args:
        url: of the folder: s3, gs, az, http(s) (through obstore where it is installed), hf, memory, file, or any other scheme
            fsspec knows.
        storage_options: keyword arguments of the file system, credentials for example; they appear in no message.
        retry: how failed requests are repeated.

    Raises:
        InputError: no installed library serves the scheme.
    """

    def __init__(self, url: str, *, storage_options: Mapping[str, Any] | None = None, retry: RetryPolicy) -> None:
        matched = _URL.match(url)
        if matched is None:
            raise InputError(f"{url} came, wanted a URL such as s3://bucket/cache")
        if urlsplit(url).query or urlsplit(url).fragment:
            raise InputError(
                f"{redacted(url)} came with a query, which can not be put behind the names of objects: give what it says in "
                "storage_options or in the environment"
            )
        self.url: Final = url.rstrip("/")
        self.name: Final = redacted(self.url)
        self.scheme: Final = matched[1].lower()
        self.retry: Final = retry
        self._options: Final = dict(storage_options or {})
        self._opened: tuple[int, Any, str] | None = None
        self._file_system()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __repr__(self) -> str:
        return f"Place({self.name})"

    @property
    def lists(self) -> bool:
        """Whether a folder can be listed; plain web servers can not."""
        return self.scheme not in ("http", "https")

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes of the object `path` (relative to the folder), or of its range [start, stop).

        Raises:
            FileNotFoundError: there is no such object.
            CacheError: the store refused, or kept failing.
        """

        def ask() -> bytes:
            file_system, root = self._file_system()
            where = f"{root}/{path}"
            try:
                data: bytes | None = (
                    file_system.cat_file(where) if start is None else file_system.cat_file(where, start=start, end=stop)
                )
            except Exception as error:
                if type(error).__name__ != "NotSupportedError" or start is None:
                    raise
                data = file_system.cat_file(where)  # a server without ranges
            if data is None:  # obstore's answer where its library panicked
                raise ConnectionError("no answer came")
            if start is not None and stop is not None and len(data) != stop - start:
                if len(data) >= stop:  # a server without ranges sends the whole
                    return data[start:stop]
                raise ConnectionError(f"{len(data)} bytes came, wanted {stop - start}")
            return data

        return self._retried(ask, path)

    def read_json(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`.

        Raises:
            FileNotFoundError: there is no such object.
            FormatError: it is no JSON object, or too large for one of ours.
            CacheError: the store refused, or kept failing.
        """
        return strict.loads(self.read(path), path)

    def list(self, path: str) -> list[str]:
        """Names in the folder `path`; empty if there is none.

        Raises:
            CacheError: the store refused, or kept failing.
        """

        def ask() -> list[str]:
            file_system, root = self._file_system()
            file_system.invalidate_cache()
            return [str(name) for name in file_system.ls(f"{root}/{path}", detail=False)]

        try:
            return [name.rstrip("/").rpartition("/")[2] for name in self._retried(ask, path)]
        except FileNotFoundError:
            return []

    def _retried(self, ask: Callable[[], T], path: str) -> T:
        return asked(ask, policy=self.retry, what=f"{self.name}/{path}")

    def _file_system(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *_open(self.url, self.scheme, self._options))
        return self._opened[1:]


def asked(ask: Callable[[], T], *, policy: RetryPolicy, what: str, done: str = "read") -> T:
    """`ask()` with retries; what lasts is one sentence without secrets.

    Args:
        ask: the request.
        policy: how often it is made.
        what: the URL asked for, without credentials.
        done: what is done to it: read, written, listed, deleted.

    Raises:
        FileNotFoundError: there is no such object.
        CacheError: the store refused, or kept failing.
    """
    try:
        return with_retries(ask, policy=policy, what=what)
    except (FileNotFoundError, StillroomError):
        raise
    except Exception as error:
        # Not the library's own words: they may quote the URL with what signs it.
        status = getattr(error, "status_code", None) or getattr(error, "errno", None)
        kind = type(error).__name__ + (f" {status}" if status else "")
        raise CacheError(
            f"{what} could not be {done} ({kind}, {policy.attempts} attempts at most): check the address, the credentials and "
            "the connection"
        ) from _quiet(error)


def open_store(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """obstore's store of the bucket that `url` names, and the prefix within it.

    Raises:
        InputError: obstore is not installed, or the options or the URL are not for it.
    """
    name = redacted(url)
    if importlib.util.find_spec("obstore") is None:
        raise InputError(f"{name} can not be written without obstore: {_EXTRA}")
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    _mind_forks(name)
    parts = urlsplit(url)
    if parts.query or parts.fragment or not parts.netloc:
        raise InputError(f"{name} came with a query or without a bucket, wanted a URL such as s3://bucket/cache")
    scheme = "s3" if parts.scheme.lower() == "s3a" else parts.scheme.lower()
    try:
        store = from_url(f"{scheme}://{parts.netloc}", **{"retry_config": _NO_RETRIES, **options})
    except (BaseError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} can not be opened ({type(error).__name__}): check the environment and storage_options"
        ) from _quiet(error)
    return store, parts.path.strip("/")


def _open(url: str, scheme: str, options: dict[str, Any]) -> tuple[Any, str]:
    if scheme in _BY_OBSTORE and importlib.util.find_spec("obstore") is not None:
        from obstore.fsspec import FsspecStore

        _mind_forks(redacted(url))
        if scheme == "http":
            options = {**options, "client_options": {"allow_http": True, **options.get("client_options", {})}}
        store = FsspecStore("s3" if scheme == "s3a" else scheme, **{"retry_config": _NO_RETRIES, **options})
        return store, url.replace("s3a://", "s3://", 1)
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        remedy = _EXTRA if scheme in _BY_OBSTORE else "install what fsspec asks for"
        raise InputError(
            f"{redacted(url)} can not be opened, nothing here reads {scheme}:// ({error}): {remedy}"
        ) from None
    return kind(**options), str(kind._strip_protocol(url)).rstrip("/")


def _mind_forks(name: str) -> None:
    global _obstore_pid
    if _obstore_pid not in (None, os.getpid()):
        raise InputError(
            f"{name} was opened before this process was forked, and obstore does not live through a fork: use "
            "DataLoader(multiprocessing_context='spawn')"
        )
    _obstore_pid = os.getpid()


def _quiet(error: Exception) -> Exception | None:
    """The cause to show in a traceback: none where its text may hold a signed URL."""
    return None if "://" in str(error) else error
