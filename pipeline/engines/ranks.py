"""Which of the workers this process is, and which shards it makes, in which order.

No worker talks to another: the commit records are all they share. Each makes its own stripe (shards rank, rank + ranks,
...). When that is done it takes what others have not, so that the run ends whoever dies. Two may then make the same shard;
the first commit counts and the bytes are the same. Three rules keep that rare:

* the first `IN_HAND` missing shards of a stripe are left to its owner, who is likely to be at them;
* shard number `p` of a stripe is for rank `-p` (modulo ranks) to take; rank `1 - p` adopts such shards when none of them was
  committed for a shard time, and so on: while they are being taken, nobody else takes them;
* a stripe that stands still for a few of this worker's shard times has lost its owner: then nothing is left to it.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from stillroom.pipeline.config import EngineConfig
from stillroom.storage.errors import InputError

IN_HAND: Final = 2  # a shard at the teacher and one at the writer
PATIENCE_SHARDS: Final = 3.0  # a stripe stands still when it has no commit for so many shard times
PATIENCE_LEAST_S: Final = 2.0
TURN_SHARDS: Final = 1.2  # shard times between the turns of two thieves
MOST_TURNS: Final = 5  # to wait for: where so many neighbours died, twice is better than late
PACE_UNKNOWN_S: Final = 20.0  # taken for the shard time of a worker that has made none


@dataclass(frozen=True, slots=True)
class Place:
    """One worker of several.

    Attributes:
        rank: which, from 0.
        ranks: how many.
        told_by: who said so, for messages.
    """

    rank: int
    ranks: int
    told_by: str = ""


def place(config: EngineConfig, environ: Mapping[str, str] | None = None) -> Place:
    """The place of this process: `--rank` and `--ranks`, else torchrun's, SLURM's or a Kubernetes Indexed Job's variables.

    Args:
        config: holds what was said explicitly.
        environ: variables; the process's own by default.

    Raises:
        InputError: half of a pair, or numbers that do not fit each other.
    """
    told = os.environ if environ is None else environ
    if config.rank is not None or config.ranks is not None:
        if config.rank is None or config.ranks is None:
            have, lack = ("--ranks", "--rank") if config.rank is None else ("--rank", "--ranks")
            raise InputError(f"{have} came without {lack}: give both, or neither to read them from the scheduler")
        return _checked(config.rank, config.ranks, "--rank and --ranks")
    if "RANK" in told and "WORLD_SIZE" in told:
        return _checked(_number(told, "RANK"), _number(told, "WORLD_SIZE"), "RANK and WORLD_SIZE")
    if "SLURM_ARRAY_TASK_ID" in told or ("SLURM_PROCID" in told and "SLURM_NTASKS" in told):
        return _slurm(told)
    if "JOB_COMPLETION_INDEX" in told:
        if "JOB_COMPLETIONS" not in told:
            raise InputError(
                "JOB_COMPLETION_INDEX is set and JOB_COMPLETIONS is not: Kubernetes does not say how many pods the job "
                "has, so set JOB_COMPLETIONS to `completions` in the pod's env, or give --rank and --ranks"
            )
        names = "JOB_COMPLETION_INDEX and JOB_COMPLETIONS"
        return _checked(_number(told, "JOB_COMPLETION_INDEX"), _number(told, "JOB_COMPLETIONS"), names)
    return Place(0, 1)


class Pause(float):
    """Seconds to wait before asking again."""


class Deal:
    """The shards for one worker, each when it is wanted; ends when the cache has all, or this worker has made them.

    Args:
        shards: of the plan.
        at: which worker.
        committed: lists the shards that have a record, at the time of the call.
        clock: seconds; of a test.

    Attributes:
        last: after the end: whether the last shard was this worker's, so that index.arrow is for it to write.
    """

    def __init__(
        self,
        shards: int,
        at: Place,
        committed: Callable[[], set[int]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.last = False
        self._shards: Final = shards
        self._at: Final = at
        self._committed: Final = committed
        self._clock: Final = clock

    def __iter__(self) -> Iterator[int]:
        for step in self.steps():
            if isinstance(step, Pause):
                time.sleep(step)
            else:
                yield step

    def steps(self) -> Iterator[int | Pause]:
        """The same, and where only others' shards are left, how long to wait before the next look."""
        at, began_s, mine = self._at, self._clock(), set[int]()
        done = self._committed()
        for shard in range(at.rank, self._shards, at.ranks):
            if shard not in done and shard not in (done := self._committed()):
                mine.add(shard)
                self.last = True
                yield shard
        stripes, classes, adopted = _Still(), _Still(), 0
        while missing := sorted(set(range(self._shards)) - self._committed() - mine):
            now = self._clock()
            pace_s = (now - began_s) / len(mine) if mine else PACE_UNKNOWN_S
            owned, free = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
            for shard in missing:
                owned[shard % at.ranks].append(shard)
            for stripe, left in owned.items():
                lost = stripes.since_s(stripe, left, now) > max(PATIENCE_LEAST_S, PATIENCE_SHARDS * pace_s)
                for shard in left if lost else left[IN_HAND:]:
                    free[(at.rank + shard // at.ranks) % at.ranks].append(shard)
            idle_s = {turn: classes.since_s(turn, left, now) for turn, left in free.items()}
            orphaned = [turn for turn in free if idle_s[turn] > TURN_SHARDS * pace_s * min(turn, MOST_TURNS)]
            turn = next((turn for turn in (0, adopted, *sorted(orphaned)) if turn in free), None)
            self.last = turn is not None
            if turn is None:
                yield Pause(min(2.0, max(0.05, pace_s / 10)))
            else:  # first choices from the end, as the owner comes from the front; others' choices the other way
                adopted = turn
                shard = min(free[turn]) if turn else max(free[turn])
                mine.add(shard)
                yield shard


class _Still:
    """Since when lists of shards are what they are."""

    def __init__(self) -> None:
        self._lists: dict[int, tuple[list[int], float]] = {}

    def since_s(self, key: int, shards: list[int], now_s: float) -> float:
        """Seconds for which the list of this key has been `shards`."""
        if key not in self._lists or self._lists[key][0] != shards:
            self._lists[key] = (shards, now_s)
        return now_s - self._lists[key][1]


def _slurm(told: Mapping[str, str]) -> Place:
    """Tasks of a job step (`srun`), of a job array, or both: the tasks of each element of the array."""
    inner, tasks = 0, 1
    if "SLURM_PROCID" in told and "SLURM_NTASKS" in told:
        inner, tasks = _number(told, "SLURM_PROCID"), _number(told, "SLURM_NTASKS")
    outer, count, names = 0, 1, "SLURM_PROCID and SLURM_NTASKS"
    if "SLURM_ARRAY_TASK_ID" in told:
        if "SLURM_ARRAY_TASK_COUNT" not in told:
            raise InputError(
                "SLURM_ARRAY_TASK_ID is set and SLURM_ARRAY_TASK_COUNT is not: give --rank and --ranks explicitly"
            )
        names = "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT"
        first = _number(told, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in told else 0
        step = _number(told, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in told else 1
        outer, rest = divmod(_number(told, "SLURM_ARRAY_TASK_ID") - first, max(step, 1))
        count = _number(told, "SLURM_ARRAY_TASK_COUNT")
        if rest or not 0 <= outer < count:
            raise InputError(
                f"the SLURM array's task {told['SLURM_ARRAY_TASK_ID']} is none of {count} from {first} in steps of {step}: "
                "number the array without gaps (--array=0-7), or give --rank and --ranks"
            )
    _checked(inner, tasks, "SLURM_PROCID and SLURM_NTASKS")
    return _checked(outer * tasks + inner, count * tasks, names)


def _checked(rank: int, ranks: int, names: str) -> Place:
    if not 0 <= rank < ranks:
        raise InputError(f"{names} came as {rank} and {ranks}, wanted the first below the second: ranks count from 0")
    return Place(rank, ranks, names)


def _number(told: Mapping[str, str], name: str) -> int:
    try:
        return int(told[name])
    except ValueError:
        raise InputError(
            f"{name} came as {told[name]!r}, wanted a whole number: unset it, or give --rank and --ranks"
        ) from None
