"""The selection of a run (`stillroom.storage.choose`) from its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from stillroom.storage.cache import Cache
from stillroom.storage.choose import Choice, Wanted, choose
from stillroom.storage.selection import Selection
from stillroom.train.config import TrainConfig

_SETTINGS: Final = tuple(Wanted.__dataclass_fields__)
# What they select is part of a run's identity (`Selection.digest`), not what the files are called.
NOT_IDENTITY: Final = {*_SETTINGS, "curriculum_share"}


def select(config: TrainConfig, source: Cache | int, sequences: int) -> Choice | None:
    """What the settings select of the first `sequences` sequences, before `with_ramp`; None: everything, once an epoch.

    Raises:
        InputError: settings or files that do not fit.
        DamagedError, CacheError: a cache that cannot be read.
    """
    wanted = Wanted(**{name: getattr(config, name) for name in _SETTINGS})
    return choose(source, wanted, sequences=sequences) if wanted else None


def with_ramp(selection: Selection, config: TrainConfig) -> Selection:
    """The selection with its curriculum's length, which is known once the steps are."""
    if selection.difficulty_S is None:
        return selection
    assert config.steps is not None
    return replace(selection, ramp=int(config.curriculum_share * config.steps) * config.batch_size)
