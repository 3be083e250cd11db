"""The sequences of a run: one cache, several, or plain tokens, and what the settings put around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache, open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.gather import COLUMNS, Column
from stillroom.train.around import ReducedVocabulary, WithColumn
from stillroom.train.config import TrainConfig
from stillroom.train.data import CacheDataset, Source, TokenDataset
from stillroom.train.loss import LOSSES
from stillroom.train.mixing import ChainedDataset, MixedDataset
from stillroom.train.student import ModelInfo

_SHARE: Final = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True, slots=True)
class Opened:
    """What a run reads.

    Attributes:
        source: its sequences.
        caches: where they come from; none for plain tokens.
        column: the user's row weights, if there are any.
        notes: sentences the user should read once.
    """

    source: Source
    caches: tuple[Cache, ...]
    column: WithColumn | None
    notes: tuple[str, ...]


def open_source(config: TrainConfig, student: ModelInfo, tokens_SL1: npt.NDArray[np.integer] | None) -> Opened:
    """Open what `config` reads.

    Args:
        config: settings.
        student: whose ids count, where there is an id map.
        tokens_SL1: for a run without a cache.

    Raises:
        InputError: caches that do not go together, or files that do not fit them.
        CacheError: a cache that cannot be read.
    """
    source: Source
    notes: list[str] = []
    caches: tuple[Cache, ...] = ()
    if config.cache is None:
        assert tokens_SL1 is not None
        source = TokenDataset(tokens_SL1)
    else:
        names, shares = cache_names(str(config.cache))
        columns = _columns(config)
        caches = tuple(
            open_cache(name, columns=columns, cache_dir=config.cache_dir, cache_bytes=config.cache_bytes)
            for name in names
        )
        with_targets = reads_targets(config)
        if len(caches) == 1:
            source = CacheDataset(caches[0], with_targets=with_targets)
        elif shares:
            source = MixedDataset(caches, shares, with_targets=with_targets)
        else:
            source = ChainedDataset(caches, with_targets=with_targets)
    column = None
    if config.row_weight_file is not None:
        source = column = WithColumn(source, config.row_weight_file)
    if config.id_map is not None:
        source = reduced = ReducedVocabulary(
            source, config.id_map, unknown=config.unknown_id, vocab_size=caches[0].manifest.vocab_size,
            student_ids=student.vocab_size,
        )  # fmt: skip
        rows, mass = reduced.lost()
        notes.append(
            f"the student's vocabulary lacks ids of the teacher: {rows:.2%} of the rows have a label it does not know and do not "
            f"count, the targets of the others lose {mass:.2%} of their mass (measured on the first sequences)"
        )
    return Opened(source, caches, column, tuple(notes))


def reads_targets(config: TrainConfig) -> bool:
    """Whether a run looks at what its cache keeps beside the tokens."""
    of_teacher = config.loss != "ce" and config.teacher is None
    return of_teacher or config.row_weight in ("entropy", "surprise") or config.hard_weight != 1.0


def _columns(config: TrainConfig) -> tuple[Column, ...]:
    """What a run needs of its cache: what is left out costs no time."""
    needed: set[Column] = {"tokens"}
    if config.loss != "ce" and config.teacher is None:
        needed |= set(LOSSES[config.loss].columns)
        if is_tempered(config):
            needed.add("logp")
    if config.row_weight == "entropy":
        needed.add("entropy")
    if config.row_weight == "surprise" or config.hard_weight != 1.0:
        needed.add("label_logp")
    return tuple(column for column in COLUMNS if column in needed)


def is_tempered(config: TrainConfig) -> bool:
    """Whether the temperature is other than 1 at some step."""
    return config.temperature != 1.0 or config.temperature_end not in (None, 1.0)


def cache_names(name: str) -> tuple[list[str], Sequence[float]]:
    """Names of the caches that a setting `cache` speaks of, and shares where each has one.

    Raises:
        InputError: some have a share and some have none.
    """
    parts = [part for part in name.split(",") if part]
    if len(parts) < 2:
        return [name], ()
    found = [_SHARE.fullmatch(part) for part in parts]
    if all(found):
        return [m[1] for m in found if m], [float(m[2]) for m in found if m]
    if any(found):
        raise InputError(
            f"cache came as {name}, where some have a share and some have none: give A:0.7,B:0.3 to mix targets, or A,B to "
            "read one after the other"
        )
    return parts, ()
