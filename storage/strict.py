"""Reading JSON that may come from a stranger: bounded, strict, and every complaint names the key."""

from __future__ import annotations

import hashlib
import json
import stat
import types
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stillroom.storage.errors import FormatError, InputError

MAX_JSON_BYTES: Final = 1 << 20
SEAL: Final = "sha256"
T = TypeVar("T")


def dumps(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no float surprises, newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


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


@lru_cache(maxsize=32)
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Build the dataclass `cls` from a JSON object: every field there, none besides, each of the annotated type.

    Fields may be int, float, str, literal words, None, unions of these, other dataclasses, `dict[str, X]` or `tuple[X, ...]`.

    Raises:
        FormatError: a key is unknown, missing or of another type, or the class refuses a value.
    """
    if not isinstance(data, dict):
        raise FormatError(f"{where} came as {type(data).__name__}, wanted an object: the file is malformed")
    assert is_dataclass(cls)
    names = {field.name for field in fields(cls)}
    if unknown := sorted(data.keys() - names):
        raise FormatError(f"{where} has the unknown key {unknown[0]!r}: this version reads {', '.join(sorted(names))}")
    if missing := sorted(names - data.keys()):
        raise FormatError(f"{where} lacks the key {missing[0]!r}: the file is malformed")
    hints = _hints(cls)
    try:
        return cls(**{name: _convert(hints[name], data[name], f"{where}.{name}") for name in data})
    except InputError as error:
        raise FormatError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if origin is Literal:  # which of the words is right is the class's to say
        return _convert(str, value, where)
    if isinstance(hint, type) and is_dataclass(hint):
        return from_json(hint, value, where)
    # bool is an int to Python, never to a file of ours
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1 << 53:
        return float(value)
    raise FormatError(
        f"{where} came as {type(value).__name__}, wanted {getattr(hint, '__name__', hint)}: the file is malformed"
    )
