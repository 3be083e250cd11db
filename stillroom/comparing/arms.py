"""Arms of a comparison and a teacher to train, as a file gives them; which keys they may set. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from stillroom.pipeline.config import CacheConfig, CorpusConfig
from stillroom.settings import unknown
from stillroom.storage.errors import InputError, StillroomError
from stillroom.train.config import TrainConfig

LIVE: Final = "live"
# What a comparison decides itself; all other keys of the two are open.
_OWN_OF_CACHE: Final = {*CorpusConfig.model_fields, "teacher", "revision", "adapter", "out", "rank", "ranks"}
_OWN_OF_TRAIN: Final = {
    "cache", "cache_dir", "cache_bytes", "window", "student", "out", "teacher", "max_sequences", "seed", "resume"
}  # fmt: skip
CACHE_KEYS: Final = tuple(name for name in CacheConfig.model_fields if name not in _OWN_OF_CACHE)
TRAIN_KEYS: Final = tuple(name for name in TrainConfig.model_fields if name not in _OWN_OF_TRAIN)


class TeacherToTrain(BaseModel):
    """A teacher that the comparison trains first, by cross-entropy on the text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    train: str | dict[str, Any] = Field(
        description="the model: a configuration (model_type and what differs from its defaults), or a folder or hub id"
    )
    tokenizer: str | int | None = Field(
        None, description="folder or hub id, or the number of ids of one made from the text (unset: the model's)"
    )
    tokens: int | None = Field(None, ge=1, description="tokens it is trained on (unset: as many as each student)")
    settings: dict[str, Any] = Field({}, description="settings of its training, over those of `train`")


class Arm(BaseModel):
    """One kind of target: which cache, which training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, max_length=60, description="in table, figures and folder names")
    cache: dict[str, Any] | None = Field(
        None, description="settings of the cache it trains from (unset: it needs none); entries_like: the arm whose entries "
        "per row it is to keep"
    )  # fmt: skip
    train: dict[str, Any] = Field({}, description="settings of its training; teacher: live asks the teacher itself")

    @property
    def folder(self) -> str:
        """Its name as part of a file name."""
        return re.sub(r"[^\w.+-]+", "-", self.name.replace("=", "")).strip("-")

    @property
    def live(self) -> bool:
        """Whether the teacher sits beside the student."""
        return self.train.get("teacher") == LIVE

    @property
    def entries_like(self) -> str | None:
        """The arm whose entries per row it keeps."""
        return None if self.cache is None else self.cache.get("entries_like")


def check_keys(where: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse a key that is not `known`, naming the nearest.

    Raises:
        InputError: such a key.
    """
    for name in values:
        if name not in known:
            raise InputError(unknown(str(name), list(known), f"key of {where}"))


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors of the block say which part of the comparison they are about."""
    try:
        yield
    except StillroomError as error:
        raise InputError(f"{what}: {error}") from error
