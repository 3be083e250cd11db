"""Reading JSON that may come from a stranger: bounded, strict, and every complaint names the key."""

from __future__ import annotations

import hashlib
import json
import stat
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stillroom.storage.errors import FormatError, InputError

MAX_JSON_BYTES: Final = 1 << 20
SEAL: Final = "sha256"
T = TypeVar("T")


def dumps(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no float surprises, newline at the end.

    It is `json.dumps(value, indent=1, sort_keys=True)`, which is compiled only without an indent: this is five times as fast.
    """
    return _text(value, "\n") + "\n"


def _text(value: Any, line: str) -> str:
    """`value`, its further lines begun by `line`."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if type(value) is int:
        return str(value)
    inner = line + " "
    if isinstance(value, dict) and value:
        items = [f"{encode_basestring_ascii(key)}: {_text(value[key], inner)}" for key in sorted(value)]
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
    if isinstance(value, list | tuple) and value:
        return f"[{inner}{f',{inner}'.join([_text(item, inner) for item in value])}{line}]"
    return json.dumps(value, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of the one JSON text of `value`, as 64 hex digits."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with its own digest in it, so that no flipped bit of the file goes unnoticed."""
    rest = {key: value for key, value in data.items() if key != SEAL}
    return {**rest, SEAL: digest(rest)}


def unsealed(data: dict[str, Any], where: str) -> dict[str, Any]:
    """What was sealed.

    Raises:
        FormatError: the digest is missing, or of something else.
    """
    rest = {key: value for key, value in data.items() if key != SEAL}
    if SEAL not in data:
        raise FormatError(f"{where} lacks the key {SEAL!r}: the file is malformed")
    if data[SEAL] != digest(rest):
        raise FormatError(
            f"{where} is not what was written, its own checksum says: restore it from where the cache came"
        )
    return rest


def loads(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object from `text`, refusing duplicate keys, NaN and anything longer than `MAX_JSON_BYTES`.

    Raises:
        FormatError: the text is not such an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    if len(text) > MAX_JSON_BYTES:
        raise FormatError(
            f"{where} holds {len(text):,} bytes, wanted at most {MAX_JSON_BYTES:,}: it is not one of ours"
        )
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is damaged JSON ({error}): restore it from where the cache came") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} holds {type(value).__name__}, wanted a JSON object: it is not one of ours")
    return value


def load_file(path: Path) -> dict[str, Any]:
    """`loads` of a file; never reads more than the limit.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: as `loads`, or it is a folder, a pipe or a file that can not be read.
    """
    try:
        # A pipe would keep us waiting for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise FormatError(f"{path.name} is not a file: restore it from where the cache came")
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise FormatError(
            f"{path.name} cannot be read ({error.strerror}): check its permissions and the disk"
        ) from error
    return loads(text, path.name)


class _MisfitError(Exception):
    """A value that is not what was wanted: where, as a path from the top, and what is wrong."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what, self.path = what, ""

    def within(self, step: str) -> _MisfitError:
        self.path = step + self.path
        return self


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from a JSON object: every field there, none besides, each of the annotated type.

    Fields may be int, float, str, literal words, None, unions of these, other dataclasses, `dict[str, X]` or `tuple[X, ...]`.

    Raises:
        FormatError: a key is unknown, missing or of another type, or the class refuses a value.
    """
    try:
        hint: Any = cls
        made: T = _reader(hint)(data)
    except _MisfitError as error:
        raise FormatError(f"{where}{error.path}{error.what}") from error.__cause__
    return made


@lru_cache(maxsize=256)
def _reader(hint: Any) -> Callable[[Any], Any]:
    """What turns a JSON value into one of type `hint`, or raises `_MisfitError`. Made once a type: a cache has many records."""
    origin = get_origin(hint)
    if origin is dict:
        return _reader_of_dict(_reader(get_args(hint)[1]))
    if origin is tuple:
        return _reader_of_list(_reader(get_args(hint)[0]))
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        inner = _reader(next(option for option in options if option is not type(None)))
        return lambda value: None if value is None and type(None) in options else inner(value)
    if origin is Literal:  # which of the words is right is the class's to say
        return _reader(str)
    if is_dataclass(hint):
        return _reader_of_class(hint)
    wanted = getattr(hint, "__name__", str(hint))

    def read(value: Any) -> Any:
        if type(value) is hint:  # so no bool is an int
            return value
        if hint is float and type(value) is int and abs(value) <= 1 << 53:
            return float(value)
        raise _MisfitError(f" came as {type(value).__name__}, wanted {wanted}: the file is malformed")

    return read


def _reader_of_class(cls: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(cls)
    readers = [(field.name, _reader(hints[field.name])) for field in fields(cls)]
    names = {name for name, _ in readers}

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _MisfitError(f" came as {type(value).__name__}, wanted an object: the file is malformed")
        if unknown := value.keys() - names:
            known = ", ".join(sorted(names))
            raise _MisfitError(f" has the unknown key {min(unknown)!r}: this version reads {known}")
        if missing := names - value.keys():
            raise _MisfitError(f" lacks the key {min(missing)!r}: the file is malformed")
        made = {}
        for name, inner in readers:
            try:
                made[name] = inner(value[name])
            except _MisfitError as error:
                raise error.within(f".{name}") from error.__cause__
        try:
            return cls(**made)
        except InputError as error:
            raise _MisfitError(f": {error}") from error

    return read


def _reader_of_dict(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _MisfitError(f" came as {type(value).__name__}, wanted dict: the file is malformed")
        made = {}
        for key, item in value.items():
            try:
                made[key] = inner(item)
            except _MisfitError as error:
                raise error.within(f".{key}") from error.__cause__
        return made

    return read


def _reader_of_list(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise _MisfitError(f" came as {type(value).__name__}, wanted tuple: the file is malformed")
        made = []
        for index, item in enumerate(value):
            try:
                made.append(inner(item))
            except _MisfitError as error:
                raise error.within(f"[{index}]") from error.__cause__
        return tuple(made)

    return read
