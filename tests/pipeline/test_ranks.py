"""Who makes which shard: what schedulers say, and the dealing, step by step on a clock of its own."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import pytest

from stillroom.pipeline.config import EngineConfig
from stillroom.pipeline.engines.ranks import Deal, Pause, Place, place
from stillroom.storage.errors import InputError


def at(environ: dict[str, str], **said: Any) -> tuple[int, int]:
    found = place(EngineConfig(**said), environ)
    return found.rank, found.ranks


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_STEP": "2",
}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"SLURM_NTASKS": "2"}, (0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        (ARRAY, (3, 4)),
        ({**ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (7, 8)),
        ({"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "6"}, (5, 6)),
    ],
)
def test_place_from_the_scheduler(environ: dict[str, str], wanted: tuple[int, int]) -> None:
    assert at(environ) == wanted
    assert at(environ, rank=1, ranks=9) == (1, 9)  # what is said wins


@pytest.mark.parametrize(
    ("environ", "said", "words"),
    [
        ({}, {"rank": 1}, ["--ranks"]),
        ({}, {"ranks": 2}, ["--rank"]),
        ({}, {"rank": 2, "ranks": 2}, ["2", "below"]),
        ({"RANK": "8", "WORLD_SIZE": "8"}, {}, ["WORLD_SIZE", "8"]),
        ({"RANK": "x", "WORLD_SIZE": "8"}, {}, ["RANK", "'x'"]),
        ({"JOB_COMPLETION_INDEX": "0"}, {}, ["JOB_COMPLETIONS", "completions"]),
        ({"SLURM_ARRAY_TASK_ID": "0"}, {}, ["SLURM_ARRAY_TASK_COUNT"]),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "2"}, {}, ["--array=0-7"]),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4"}, {}, ["--array=0-7"]),
    ],
)
def test_half_a_place_is_refused(environ: dict[str, str], said: dict[str, int], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        at(environ, **said)
    for word in words:
        assert word in str(caught.value)


def play(shards: int, paces_s: list[float], *, dies_at_s: dict[int, float] | None = None, done: int = 0) -> Any:
    """Workers of these seconds a shard, some of whom die, on a virtual clock: (times each shard was begun, seconds, lasts)."""
    now = [0.0]
    committed = set(range(done))
    places = [Place(rank, len(paces_s)) for rank in range(len(paces_s))]
    deals = [Deal(shards, one, lambda: set(committed), clock=lambda: now[0]) for one in places]
    steps = [deal.steps() for deal in deals]
    begun = [0] * shards
    events: list[tuple[float, int, int | None]] = [(0.0, rank, None) for rank in range(len(paces_s))]
    while events:
        now[0], rank, made = heapq.heappop(events)
        if now[0] >= (dies_at_s or {}).get(rank, 1e9):
            continue
        if made is not None:
            committed.add(made)
        step = next(steps[rank], None)
        if isinstance(step, Pause):
            heapq.heappush(events, (now[0] + step, rank, None))
        elif step is not None:
            begun[step] += 1
            heapq.heappush(events, (now[0] + paces_s[rank] * (1 + 0.01 * rank), rank, step))
    return begun, now[0], committed, [deal.last for deal in deals]


def test_every_shard_once_by_equal_workers() -> None:
    for ranks in (1, 2, 4, 7):
        begun, seconds, committed, lasts = play(103, [10.0] * ranks)
        assert begun == [1] * 103
        assert len(committed) == 103
        assert seconds <= 10.5 * (-(-103 // ranks)) * 1.07
        assert sum(lasts) == 1


def test_the_rest_finish_when_workers_die() -> None:
    for dead in ({2: 55.0}, {0: 5.0, 1: 5.0}, {0: 31.0, 1: 3.0, 3: 80.0}):
        begun, _, committed, _ = play(80, [10.0] * 4, dies_at_s=dead)
        assert len(committed) == 80
        # One shard in hand lost with each; near the end, at most one twice for each that lives, and one more.
        assert sum(begun) - 80 <= 5, (dead, sum(begun))


def test_a_slow_worker_is_helped() -> None:
    begun, seconds, committed, _ = play(90, [10.0, 10.0, 60.0])
    assert len(committed) == 90
    assert seconds < 600  # alone with its stripe the slow one would take 1,800
    assert sum(begun) - 90 <= 4  # what the slow one had in hand, which looked dead to the fast, and one each at the end


def test_no_worker_without_a_shard_waits_for_ever() -> None:
    begun, _, committed, _ = play(3, [10.0] * 3, done=2)
    assert len(committed) == 3
    assert sum(begun) == 1
    begun, _, committed, _ = play(9, [10.0] * 3, done=8, dies_at_s={2: 1.0})
    assert len(committed) == 9


def test_settings_change_no_cache(tmp_path: Path) -> None:
    from stillroom.pipeline.config import CacheConfig

    plain = CacheConfig(teacher="t", data="d", out=tmp_path)
    spread = CacheConfig(teacher="t", data="d", out=tmp_path, engine="local", workers=3, threads=2)
    assert plain.sampler_spec() == spread.sampler_spec()
