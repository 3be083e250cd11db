"""From settings to the objective of a run: what contradicts itself, which targets carry the loss, schedules, row weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.rows import RowColumn, row_statistics
from stillroom.train.config import ScheduleName, TrainConfig
from stillroom.train.loss import LOSSES
from stillroom.train.objective import Objective
from stillroom.train.row_weights import RowWeights
from stillroom.train.schedule import Schedule
from stillroom.train.sources import Opened, is_tempered
from stillroom.train.targets import Cached
from stillroom.train.validity import settle

_OWN: Final = tuple(dict.fromkeys(name for loss in LOSSES.values() for name in loss.settings))
_OF_REQUEST: Final = tuple(name for name in _OWN if not name.startswith("taid"))  # the schedule is settled here


def check_loss(config: TrainConfig, has_tokens: bool) -> None:
    """Settings that contradict each other, before anything is opened.

    Args:
        config: as the user gave it.
        has_tokens: whether the run was given token sequences beside its settings.

    Raises:
        InputError: naming the setting to drop or add.
    """
    for name in ("alpha", "alpha_end"):
        value = getattr(config, name)
        if value is not None and not 0.0 <= value <= 1.0:
            raise InputError(f"{name} came as {value}, wanted 0 to 1, the share of cross-entropy: change it")
    if config.cache is not None and has_tokens:
        raise InputError("both a cache and tokens were given, and each says what the student reads: give one of them")
    if config.cache is None and not has_tokens:
        raise InputError(f"loss {config.loss} came without text: give --cache, whose token sequences it can use")
    if config.cache is None and config.teacher is None and config.loss != "ce":
        raise InputError(
            f"loss {config.loss} needs a teacher: give --cache with its targets, --teacher to ask it live, or --loss ce"
        )
    if config.loss == "ce":
        for name, given in (("alpha", config.alpha or config.alpha_end), ("teacher", config.teacher)):
            if given:
                raise InputError(
                    f"{name} came with loss ce, which is cross-entropy alone: drop --{name}, or choose another --loss"
                )
    for name in _OWN:
        users = [loss for loss, entry in LOSSES.items() if name in entry.settings]
        shared = name == "hard_share" and config.hard_weight != 1.0
        if getattr(config, name) != TrainConfig.model_fields[name].default and config.loss not in users and not shared:
            flag = name.replace("_", "-")
            raise InputError(f"{name} is for --loss {' or '.join(users)}, and the loss is {config.loss}: drop --{flag}")
    if (config.row_weight == "column") != (config.row_weight_file is not None):
        raise InputError("row_weight column and row_weight_file go together: give both, or neither")
    if config.cache is None and (config.row_weight in ("entropy", "surprise") or config.hard_weight != 1.0):
        raise InputError("row weights by what the teacher thinks are read from a cache: give --cache, or drop them")
    if config.id_map is not None and (config.cache is None or config.teacher is not None):
        raise InputError("id_map brings a cache's targets to the student's ids: give --cache, and no --teacher")


def settle_objective(config: TrainConfig, opened: Opened, vocab_size: int) -> tuple[Objective, tuple[str, ...]]:
    """The objective of a run, and sentences the user should read. A live teacher is put in when it is loaded.

    Args:
        config: settled settings: `steps` is set.
        opened: what the run reads.
        vocab_size: columns of the logits that take part.

    Raises:
        InputError: targets that cannot carry the loss.
    """
    assert config.steps is not None
    live = config.teacher is not None
    missing, notes = settle(
        config.loss,
        None if live or config.loss == "ce" else opened.source.kind,
        missing=config.missing,
        tempered=is_tempered(config),
        allow_biased=config.allow_biased,
    )
    own: dict[str, Any] = {name: getattr(config, name) for name in _OF_REQUEST}
    if config.loss == "tail_aware" and not live:
        own["head_logp"] = float(np.float32(-math.log(opened.caches[0].manifest.sampler.draws)))
    if config.loss == "dkd" and not live and any(cache.manifest.teacher.imported for cache in opened.caches):
        distribution(opened.caches, "label_logp")  # refuses rows that do not know it
    if config.loss == "atkd":
        if not opened.caches:
            raise InputError(
                "loss atkd splits rows at a quantile of the whole data, which a cache has: give --cache too"
            )
        own["hard_upto"], own["hard_share"] = _hardest(opened.caches, config.hard_share)
    objective = Objective(
        name=config.loss,
        vocab_size=vocab_size,
        targets=Cached(),
        alpha=_schedule(config, config.alpha, config.alpha_end, config.alpha_schedule),
        temperature=_schedule(config, config.temperature, config.temperature_end, config.temperature_schedule),
        taid=_schedule(config, config.taid_start, config.taid_end, config.taid_schedule),
        missing=missing,
        settings=own,
        row_weights=_row_weights(config, opened),
    )
    return objective, notes


def _schedule(config: TrainConfig, start: float, end: float | None, shape: ScheduleName) -> Schedule:
    assert config.steps is not None
    return Schedule(start, start if end is None else end, shape, config.steps, config.decay)


def _row_weights(config: TrainConfig, opened: Opened) -> RowWeights | None:
    if config.row_weight is None and config.hard_weight == 1.0:
        return None
    mean, power = 1.0, config.row_weight_power
    if config.row_weight == "column":
        assert opened.column is not None
        mean = opened.column.mean_power(power)
    elif config.row_weight is not None:
        column: RowColumn = "entropy" if config.row_weight == "entropy" else "label_logp"
        value_C, count_C = distribution(opened.caches, column)
        power_C = np.abs(value_C.astype(np.float64)) ** power
        mean = float(power_C @ count_C / count_C.sum())
        if mean == 0.0:
            raise InputError(f"every row has {config.row_weight} 0, so none would weigh anything: drop --row-weight")
    upto, share = (None, 0.0) if config.hard_weight == 1.0 else _hardest(opened.caches, config.hard_share)
    return RowWeights(
        config.row_weight, power, mean, upto, config.hard_weight, 1.0 + share * (config.hard_weight - 1.0)
    )


def _hardest(caches: Sequence[Cache], share: float) -> tuple[float, float]:
    """Log-probability of the label up to which a row is among the hardest, and the share of rows that are (ties count)."""
    value_C, count_C = distribution(caches, "label_logp")
    upto = np.cumsum(count_C)
    place = int(np.searchsorted(upto, share * upto[-1]))
    if place == len(upto) - 1:
        raise InputError(
            f"hard_share {share} takes every row of the cache, because so many have the same log-probability: lower --hard-share"
        )
    return float(value_C[place]), float(upto[place] / upto[-1])


def distribution(caches: Sequence[Cache], column: RowColumn) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Values of a column over all rows of all caches, ascending, and how many rows have each.

    Raises:
        InputError: a row has none, as in a cache that was imported from another tool.
    """
    statistics = [row_statistics(cache) for cache in caches]
    lacking = sum(int((found.entropy_C if column == "entropy" else found.label_logp_C)[-1]) for found in statistics)
    if lacking:
        raise InputError(
            f"{lacking:,} of {sum(found.rows for found in statistics):,} rows of the cache have no {column}, which what was "
            "asked for needs of every row (an import knows as much as its files do): choose another loss or row weight"
        )
    found = [one.distribution(column) for one in statistics]
    values, of = np.unique(np.concatenate([value_C for value_C, _ in found]), return_inverse=True)
    counts = np.bincount(of, np.concatenate([count_C for _, count_C in found]), len(values))
    return values, counts.astype(np.int64)
