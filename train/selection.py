"""The selection of a run (`stillroom.storage.choose`) from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from stillroom.storage.cache import Cache
from stillroom.storage.choose import Choice, Wanted, choose
from stillroom.storage.selection import Selection
from stillroom.train.config import TrainConfig

_SETTINGS: Final = tuple(Wanted.__dataclass_fields__)
# What they select is part of a run's identity (`Selection.digest`), not what the files are called.
NOT_IDENTITY: Final = {*_SETTINGS, "curriculum_share"}


def select(config: TrainConfig, caches: Sequence[Cache], total: int, sequences: int) -> Choice | None:
    """What the settings select of a source, before `with_ramp`; None: everything, once an epoch.

    Args:
        config: settings.
        caches: of the source; of a mixture the first one's figures count, which has the sequences of all.
        total: sequences of the source.
        sequences: select from the first so many.

    Raises:
        InputError: settings or files that do not fit.
        DamagedError, CacheError: a cache that cannot be read.
    """
    wanted = Wanted(**{name: getattr(config, name) for name in _SETTINGS})
    if not wanted:
        return None
    figures = caches if sum(map(len, caches)) == total else caches[:1]
    return choose(figures or total, wanted, sequences=sequences)


def with_ramp(selection: Selection, config: TrainConfig) -> Selection:
    """The selection with its curriculum's length, which is known once the steps are."""
    if selection.difficulty_S is None:
        return selection
    assert config.steps is not None
    return replace(selection, ramp=int(config.curriculum_share * config.steps) * config.batch_size)
