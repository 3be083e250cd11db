"""Built-in settings files to copy and own: `stillroom ls`, `stillroom cp NAME FILE`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from stillroom.console import say
from stillroom.settings import unknown
from stillroom.storage.errors import InputError


class ListConfig(BaseModel):
    """Settings of `stillroom ls`: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CopyConfig(BaseModel):
    """Settings of `stillroom cp`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(description="a recipe that `stillroom ls` lists")
    file: Path = Field(description="where to put it; a file that is there is not written over")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One built-in file.

    Attributes:
        name: file stem.
        summary: its first line.
        text: the whole file.
    """

    name: str
    summary: str
    text: str


def recipes() -> dict[str, Recipe]:
    """The built-in recipes by name."""
    found = {}
    for entry in sorted(files(__name__).iterdir(), key=lambda entry: entry.name.split(".")[0]):
        if entry.name.endswith(".yaml"):
            name, text = entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")
            found[name] = Recipe(name, text.split("\n", 1)[0].removeprefix("# "), text)
    return found


def ls(config: ListConfig, as_json: bool) -> list[dict[str, str]]:
    """`stillroom ls`."""
    del config
    found = [{"name": recipe.name, "summary": recipe.summary} for recipe in recipes().values()]
    if not as_json:
        width = max(len(one["name"]) for one in found)
        for one in found:
            print(f"{one['name']:<{width}}  {one['summary']}")
    return found


def cp(config: CopyConfig, as_json: bool) -> dict[str, str]:
    """`stillroom cp`.

    Raises:
        InputError: no such recipe, or the file is there already or can not be written.
    """
    found = recipes()
    if config.name not in found:
        raise InputError(unknown(config.name, list(found), "recipe"))
    try:
        with config.file.open("x", encoding="utf-8") as file:
            file.write(found[config.name].text)
    except FileExistsError as error:
        raise InputError(f"{config.file} is there already: name another file, or remove it") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(
            f"{config.file} can not be made ({error.strerror}): name a file in a folder that is there"
        ) from error
    if not as_json:
        say(
            f"{config.name} -> {config.file}: change it, then `stillroom {config.name.split('-')[0]} --config {config.file}`"
        )
    return {"name": config.name, "file": str(config.file)}
