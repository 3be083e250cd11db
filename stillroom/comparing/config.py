"""Settings of `stillroom compare`. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import BeforeValidator, Field, model_validator

from stillroom.comparing.arms import CACHE_KEYS, LIVE, TRAIN_KEYS, Arm, TeacherToTrain, check_keys, naming
from stillroom.pipeline.config import CacheConfig, CorpusConfig
from stillroom.settings import unknown, validate
from stillroom.storage.errors import InputError
from stillroom.train.config import TrainConfig

PYTHON_SOURCES: Final = "python-sources"


def _seeds(value: Any) -> Any:
    return (
        [word for word in value.split(",") if word]
        if isinstance(value, str)
        else [value]
        if isinstance(value, int)
        else value
    )


def _teacher(value: Any) -> Any:
    return validate(TeacherToTrain, value, inside="teacher") if isinstance(value, dict) else value


def _arms(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(arm, dict) for arm in value):
        return value
    return [validate(Arm, arm, inside=f"arms.{arm.get('name', place)}") for place, arm in enumerate(value)]


class CompareConfig(CorpusConfig):
    """Settings of `stillroom compare`: arms times seeds of one student, one teacher, one text."""

    data: str = Field(
        description=f"text as in `stillroom cache`, or {PYTHON_SOURCES}: the sources of your own Python, split by file"
    )
    out: Path = Field(description="folder of text, caches, students, table and figures")
    teacher: Annotated[str | TeacherToTrain, BeforeValidator(_teacher)] = Field(
        description="folder or hub id; in a file also what to train one from"
    )
    student: str | dict[str, Any] = Field(
        description="folder or hub id; in a file also a configuration: model_type and what differs from its defaults"
    )
    tokens: int | None = Field(None, ge=1, description="tokens each student is trained on (or max_sequences)")
    held_out: str | None = Field(None, description="text to measure on (unset: a share of data)")
    held_out_share: float = Field(
        0.05, gt=0, lt=1, description="share of the documents of data, by a hash of each, that is held out"
    )
    held_out_sequences: int = Field(192, ge=1, description="measure on the first so many sequences")
    batch_size: int = Field(8, ge=1, description="sequences per forward when measuring")
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seeds)] = Field((0, 1), description="one student each: 0,1")
    train: dict[str, Any] = Field({}, description="settings of every student's training; --train.lr 3e-4 sets one")
    cache: dict[str, Any] = Field({}, description="settings of every cache; --cache.batch_size 32 sets one")
    gap: tuple[str, str] | None = Field(
        None, description="arms at 0 and 100 % of the gap (unset: the first of loss ce, the first live forward_kl)"
    )
    arms: Annotated[tuple[Arm, ...], BeforeValidator(_arms)] = Field(
        min_length=1, description="in a file: name, cache and train of each"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.messages_column is not None or self.packing != "concat":
            raise InputError("compare reads plain text packed end to end: drop messages_column and packing")
        if self.tokens is not None and self.max_sequences is not None:
            raise InputError("tokens and max_sequences both came, and each says how much text is read: give one")
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise InputError(f"seeds came as {list(self.seeds)}, wanted at least one and each once: change them")
        names = [arm.name for arm in self.arms]
        for what, found in (("name", names), ("folder name", [arm.folder for arm in self.arms])):
            twice = [name for name in found if found.count(name) > 1 or not name]
            if twice:
                raise InputError(f"two arms have the {what} {twice[0]!r}: give each a name of its own")
        for name in self.gap or ():
            if name not in names:
                raise InputError(unknown(name, names, "arm (gap)"))
        check_keys("train", self.train, TRAIN_KEYS)
        check_keys("cache", self.cache, CACHE_KEYS)
        if isinstance(self.teacher, TeacherToTrain):
            self.teacher_training("student", Path("teacher"))
        for arm in self.arms:
            self._check_arm(arm, names)
        return self

    def _check_arm(self, arm: Arm, names: list[str]) -> None:
        where = f"arms.{arm.name}"
        check_keys(f"{where}.train", arm.train, (*TRAIN_KEYS, "teacher"))
        if arm.train.get("teacher") not in (None, LIVE):
            raise InputError(
                f"{where}.train.teacher came as {arm.train['teacher']!r}, wanted {LIVE}: the one of all arms"
            )
        self.training(
            arm, seed=0, teacher="teacher", student="student", cache=None if arm.cache is None else Path("cache")
        )
        if arm.cache is None:
            return
        check_keys(f"{where}.cache", arm.cache, (*CACHE_KEYS, "entries_like"))
        if (other := arm.entries_like) is not None:
            if other not in names:
                raise InputError(unknown(other, names, f"arm ({where}.cache.entries_like)"))
            model = self.arms[names.index(other)]
            if model.cache is None or model.entries_like is not None:
                raise InputError(
                    f"{where}.cache.entries_like is {other}, whose own draws are not given: name an arm that has them"
                )
            if {"draws", "entries_per_row"} & {*arm.cache}:
                raise InputError(
                    f"{where}.cache has entries_like, which its draws are solved for: drop draws and entries_per_row"
                )
        with naming(f"arm {arm.name}"):
            self.caching(arm, corpus="data", teacher="teacher", out=Path("cache")).sampler_spec()

    def corpus(self, data: str, sequences: int | None) -> CorpusConfig:
        """How to read `data` up to so many sequences."""
        chosen = {name: getattr(self, name) for name in CorpusConfig.model_fields}
        return CorpusConfig(**{**chosen, "data": data, "max_sequences": sequences})

    @property
    def sequences(self) -> int | None:
        """Sequences each student is trained on; None: all there are."""
        return self.max_sequences if self.tokens is None else max(1, self.tokens // self.seq_len)

    def caching(self, arm: Arm, *, corpus: str, teacher: str, out: Path, **solved: Any) -> CacheConfig:
        """Settings of the cache of an arm that has one.

        Args:
            arm: one of `arms`.
            corpus, teacher, out: as the run has them.
            solved: keys found out since, over the arm's.

        Raises:
            InputError: a setting that does not fit, naming the arm.
        """
        own = {name: value for name, value in (arm.cache or {}).items() if name != "entries_like"}
        values = {
            **self.corpus(corpus, self.sequences).model_dump(), "sequences_per_shard": 512, **self.cache, **own,
            "teacher": teacher, "out": out, **solved,
        }  # fmt: skip
        return validate(CacheConfig, values, inside=f"arms.{arm.name}.cache")

    def training(self, arm: Arm, *, seed: int, teacher: str, student: str, cache: Path | None) -> TrainConfig:
        """Settings of the training of one student; `out` is its folder below that of the comparison.

        Raises:
            InputError: a setting that does not fit, naming the arm.
        """
        values = {
            **self.train, **arm.train, "teacher": teacher if arm.live else None, "student": student, "cache": cache, "seed": seed,
            "out": self.out / "students" / f"{arm.folder}-{seed}",
        }  # fmt: skip
        return validate(TrainConfig, values, inside=f"arms.{arm.name}.train")

    def teacher_training(self, student: str, out: Path) -> TrainConfig:
        """Settings of the teacher's own training, where it is to be trained.

        Raises:
            InputError: a setting that does not fit.
        """
        assert isinstance(self.teacher, TeacherToTrain)
        check_keys("teacher.settings", self.teacher.settings, (*TRAIN_KEYS, "seed"))
        values = {**self.train, **self.teacher.settings, "loss": "ce", "student": student, "out": out}
        return validate(TrainConfig, values, inside="teacher.settings")

    def gap_arms(self) -> tuple[str, str] | None:
        """The arms at 0 and at 100 % of the gap, if there are two."""
        if self.gap is not None:
            return self.gap
        ce = [arm.name for arm in self.arms if {**self.train, **arm.train}.get("loss") == "ce"]
        full = [
            arm.name
            for arm in self.arms
            if arm.live and {**self.train, **arm.train}.get("loss", "forward_kl") == "forward_kl"
        ]
        return (ce[0], full[0]) if ce and full else None
