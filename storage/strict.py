"""Reading JSON that may come from a stranger: bounded, strict, and every complaint names the key."""

from __future__ import annotations

import json
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stillroom.storage.errors import FormatError, InputError

MAX_JSON_BYTES: Final = 1 << 20
T = TypeVar("T")


def dumps(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no float surprises, newline at the end."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


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
        FormatError: as `loads`.
    """
    with path.open("rb") as file:
        return loads(file.read(MAX_JSON_BYTES + 1), path.name)


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
    hints = get_type_hints(cls)
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
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise FormatError(
        f"{where} came as {type(value).__name__}, wanted {getattr(hint, '__name__', hint)}: the file is malformed"
    )
