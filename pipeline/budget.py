"""`--entries-per-row E`: the number of draws N at which a row keeps E entries, solved on the corpus' first sequences.

The answer is a function of teacher, sampler and those sequences alone, so the same command run again finds the cache it
made. For `threshold` a row's entries never fall as N grows: where an id of mass p passes from tail to head the tail loses
less than one draw per id, floor(N T) <= k + floor(N' T') for k such ids. For the others it is their mean that grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.packing import PackedCorpus
from stillroom.pipeline.probe import Probe, probe
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.depot import depot_at
from stillroom.storage.errors import InputError, PlanMismatchError
from stillroom.storage.manifest import MANIFEST_NAME, Manifest
from stillroom.storage.spec import MAX_DRAWS, SamplerSpec


def settled_spec(config: CacheConfig, teacher: Teacher, corpus: PackedCorpus) -> SamplerSpec:
    """The sampler of a run, its draws solved for where `entries_per_row` is asked for.

    Args:
        config: as given.
        teacher, corpus: of the run.

    Raises:
        InputError: no number of draws keeps so many entries.
        PlanMismatchError: the cache that is there was made with another number of draws than is found now.
    """
    spec = config.sampler_spec()
    if config.entries_per_row is None:
        return spec
    draws = solve_draws(probe(teacher, corpus, batch_size=config.batch_size), spec, config.entries_per_row)
    made = _made_with(config)
    if made is not None and made != draws:
        raise PlanMismatchError(
            f"{config.out} was made with {made} draws, --entries-per-row {config.entries_per_row:g} now solves to {draws}: "
            f"give --draws {made} to go on with that cache (another teacher, corpus or kind of GPU moves the answer), "
            "or choose another directory"
        )
    return replace(spec, draws=draws)


def solve_draws(rows: Probe, spec: SamplerSpec, entries_per_row: float) -> int:
    """The N whose mean entries over the probe's rows come nearest to `entries_per_row`; the smaller of two.

    Args:
        rows: measured rows.
        spec: the sampler; its draws do not matter.
        entries_per_row: wanted mean.

    Raises:
        InputError: out of reach of 1 to 4,096 draws.
    """

    @cache
    def entries(draws: int) -> float:
        return rows.sample(replace(spec, draws=draws)).entries / rows.rows

    if entries_per_row < entries(1):
        raise InputError(
            f"--entries-per-row came as {entries_per_row:g}, a row keeps at least {entries(1):g}: ask for more"
        )
    high = _first(lambda draws: entries(draws) >= entries_per_row)
    if high is None:
        raise InputError(
            f"--entries-per-row came as {entries_per_row:g}, {MAX_DRAWS} draws of {spec.kind} keep {entries(MAX_DRAWS):.2f} "
            "with this teacher: ask for fewer"
        )
    below = max(1, high - 1)
    return below if entries_per_row - entries(below) <= entries(high) - entries_per_row else high


def _first(enough: Callable[[int], bool]) -> int | None:
    """The smallest number of draws that is enough: doubling, then halving; None: not even the most are."""
    high = 1
    while not enough(high):
        if high == MAX_DRAWS:
            return None
        high = min(2 * high, MAX_DRAWS)
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _made_with(config: CacheConfig) -> int | None:
    """Draws of the cache that is at `config.out`, if one is there."""
    try:
        return Manifest.from_json(depot_at(config.out).read_json(MANIFEST_NAME)).sampler.draws
    except FileNotFoundError:
        return None
