"""Command lines and YAML files to typed settings: one pydantic model serves flags, file and Python alike.

Precedence: defaults, then `--config FILE`, then flags. An unknown key or flag is an error that names the nearest one.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stillroom.storage.errors import InputError

Model = TypeVar("Model", bound=BaseModel)
_NUMBER: Final = re.compile(r"-?[\d.]+(e-?\d+)?")
_YES_NO: Final = ("true", "false", "yes", "no", "on", "off", "1", "0")


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of leaving, so that one place prints errors."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}: see `{self.prog} --help`")


def parse(
    model: type[Model],
    argv: Sequence[str],
    *,
    prog: str,
    summary: str,
    examples: str,
    positional: str | tuple[str, ...] | None = None,
) -> tuple[Model, bool]:
    """Settings of one command from its arguments.

    Args:
        model: pydantic model; every field is a flag (`seq_len` is `--seq-len`).
        argv: arguments after the command's name.
        prog: what the user typed before them.
        summary: one sentence on the command.
        examples: shown below the options.
        positional: the field, or fields in the model's order, that may also stand alone, without their flags.

    Returns:
        The settings, and whether `--json` was asked for.

    Raises:
        InputError: an unknown flag or key, a value that does not fit, a missing one.
    """
    alone = (positional,) if isinstance(positional, str) else positional or ()
    parser = _parser(model, prog, summary, examples, alone)
    given, stray = parser.parse_known_args(_with_values(model, argv))
    parts, stray = _dotted(model, stray)
    if stray:
        raise InputError(unknown(stray[0], [_flag(name) for name in model.model_fields], f"option of {prog}"))
    flags = {name: value for name, value in vars(given).items() if value is not None}
    as_json, file = bool(flags.pop("json", False)), flags.pop("config", None)
    for name in alone:
        if f"{name}_" in flags:
            flags[name] = flags.pop(f"{name}_")
    values = {**(read_yaml(Path(file), model) if file else {}), **flags}
    for name, part in parts.items():
        whole = values.get(name, {})
        if not isinstance(whole, dict):
            raise InputError(f"{_flag(name)} is {whole}, which has no {next(iter(part))}: give it whole")
        values[name] = {**whole, **part}
    return validate(model, values), as_json


def read_yaml(file: Path, model: type[BaseModel]) -> dict[str, Any]:
    """Keys and values of a YAML settings file, keys checked against `model`."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"settings file {file} can not be read ({reason}): name a YAML file of `key: value`"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"settings file {file} holds {type(values).__name__}, wanted `key: value` lines")
    values = {f"{key}_" if f"{key}_" in model.model_fields else key: value for key, value in values.items()}
    for key in values:
        if key not in model.model_fields:
            raise InputError(unknown(str(key), list(model.model_fields), f"key in {file}"))
    return values


def validate(model: type[Model], values: dict[str, Any], *, inside: str = "") -> Model:
    """`model(**values)`, its first complaint as one sentence.

    Args:
        model: pydantic model.
        values: by field.
        inside: the setting of a file that these values are, where they are not a command's own: its fields have no flags.

    Raises:
        InputError: an unknown key, a value that does not fit, or a missing one.
    """
    try:
        return model(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        shown = f"{inside}.{name}" if inside else _flag(name)
        if first["type"] == "missing":
            description = model.model_fields[name].description
            where = "in the file" if inside else "on the command line or in --config"
            raise InputError(f"{shown} is missing ({description}): give it {where}") from error
        if first["type"] == "extra_forbidden":
            raise InputError(unknown(name, list(model.model_fields), f"key of {inside or 'the settings'}")) from error
        complaint = first.get("ctx", {}).get("error")
        if isinstance(complaint, InputError):  # of a setting within a setting: it says where
            raise complaint from error
        said = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if not name:
            raise InputError(said) from error
        raise InputError(f"{shown} came as {first['input']!r}, but it {said}") from error


def _parser(model: type[BaseModel], prog: str, summary: str, examples: str, alone: tuple[str, ...]) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=summary,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, field in model.model_fields.items():
        if name in alone:
            parser.add_argument(f"{name}_", metavar=name.upper(), nargs="?", help=field.description)
        spellings = [_flag(name)] + ([f"--{name}"] if "_" in name.rstrip("_") else [])
        default = "" if field.is_required() or field.default in (None, "") else f" [{field.default}]"
        parser.add_argument(
            *spellings, dest=name, metavar=_metavar(field), help=f"{field.description}{default}".replace("%", "%%")
        )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it")
    parser.add_argument("--json", action="store_true", default=None, help="print the result as JSON on standard output")
    return parser


def _dotted(model: type[BaseModel], stray: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`--train.lr 3e-4` sets one key of a setting that is a mapping. Returns them by setting, and the words that are left."""
    found: dict[str, dict[str, Any]] = {}
    left: list[str] = []
    words = iter(stray)
    for word in words:
        flag, given, value = word.partition("=")
        name, _, key = flag.removeprefix("--").replace("-", "_").partition(".")
        field = model.model_fields.get(name) if flag.startswith("--") and key else None
        if field is None or dict not in [get_origin(a) for a in (field.annotation, *get_args(field.annotation))]:
            left.append(word)
            continue
        text = value if given else next(words, None)
        if text is None:
            raise InputError(f"{flag} came without a value: give it one")
        found.setdefault(name, {})[key] = yaml.safe_load(text)
    return found, left


def _with_values(model: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """A switch may stand alone: `--hashes` is `--hashes=true`, whatever follows it, unless that is a yes or a no.

    So may an option whose field says, as `alone`, what it means then, unless a number follows.
    """
    alone = {_flag(name): str(extra["alone"]) for name, field in model.model_fields.items()
             if isinstance(extra := field.json_schema_extra, dict) and "alone" in extra}  # fmt: skip
    following = [*argv[1:], ""]
    argv = [f"{w}={alone[w]}" if w in alone and not _NUMBER.fullmatch(n) else w for w, n in zip(argv, following)]
    switches = {_flag(name) for name, field in model.model_fields.items() if field.annotation is bool}
    switches |= {flag.replace("-", "_").replace("__", "--", 1) for flag in switches}
    result: list[str] = []
    for word in argv:
        if result and result[-1] in switches and word.lower() in _YES_NO:
            result[-1] += f"={word}"
        else:
            result.append(word)
    return [f"{word}=true" if word in switches else word for word in result]


def _metavar(field: FieldInfo) -> str:
    annotation = field.annotation
    choices = [
        c for a in (annotation, *get_args(annotation)) if str(get_origin(a)) == "typing.Literal" for c in get_args(a)
    ]
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    names = [a.__name__ for a in (get_args(annotation) or (annotation,)) if isinstance(a, type) and a is not type(None)]
    return {"str": "TEXT", "int": "N", "float": "X", "bool": "BOOL", "Path": "PATH"}.get(
        names[0] if names else "", "VALUE"
    )


def _flag(name: str) -> str:
    """The flag of a field; one that would be a word of Python's ends with `_` there."""
    return "--" + name.rstrip("_").replace("_", "-")


def unknown(got: str, known: list[str], what: str) -> str:
    """The sentence for a word that is none of `known`, with the nearest of them."""
    got = got.split("=")[0]
    near = difflib.get_close_matches(got, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return f"{got} is no {what}: {hint}"
