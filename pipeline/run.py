"""The run of stage one: the plan, then one shard after another, each a pure function of (manifest, shard index).

Data flow: packed tokens -> `stages`: body, head, sampler, copy to the host -> rows of a shard -> encode and commit on the
writer's thread, which holds this one up when it falls behind.
Shapes: `S` sequences of a shard, `L` rows per sequence, `R` = S * L rows.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from stillroom.kernels.sample import uniforms
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.host import peak_bytes
from stillroom.pipeline.prepare import Prepared, Progress
from stillroom.pipeline.stage_clock import StageClock
from stillroom.pipeline.stages import Batch, Sampling
from stillroom.storage.manifest import Manifest
from stillroom.storage.segments import positions_of
from stillroom.storage.targets import SparseTargets

if TYPE_CHECKING:
    from stillroom.pipeline.engines.stop import Stop

ROUNDING_STREAM: Final = 1  # stream 0 draws the targets; this one rounds them to codes
ROUNDING_UNIFORMS: Final = 3
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunStats:
    """What one process did.

    Attributes:
        shards, sequences: made and committed here.
        seconds: wall time.
        stages: seconds of each stage, see `stage_clock.STAGES`.
        bad_rows: rows that keep nothing because no sampler could use their logits.
        peak_host_bytes, peak_device_bytes: most memory this process held (no CUDA device: None).
        notes: what the user should know.
        taken_up: those of the sequences that an earlier attempt had put through the teacher before it was killed or stopped.
    """

    shards: int = 0
    sequences: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    bad_rows: int = 0
    peak_host_bytes: int = 0
    peak_device_bytes: int | None = None
    notes: tuple[str, ...] = ()
    taken_up: int = 0

    @staticmethod
    def together(parts: Iterable[RunStats]) -> RunStats:
        """What several processes did: seconds and memory are those of the longest and the largest, all else adds up."""
        all_parts = [RunStats(), *parts]
        stages: Counter[str] = Counter()
        for part in all_parts:
            stages.update(part.stages)
        devices = [part.peak_device_bytes for part in all_parts if part.peak_device_bytes is not None]
        return RunStats(
            shards=sum(part.shards for part in all_parts),
            sequences=sum(part.sequences for part in all_parts),
            seconds=max(part.seconds for part in all_parts),
            stages=dict(stages),
            bad_rows=sum(part.bad_rows for part in all_parts),
            peak_host_bytes=max(part.peak_host_bytes for part in all_parts),
            peak_device_bytes=max(devices, default=None),
            notes=tuple(dict.fromkeys(note for part in all_parts for note in part.notes)),
            taken_up=sum(part.taken_up for part in all_parts),
        )


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What a run of stage one did.

    Attributes:
        out: directory or URL of the cache.
        sequences, rows: size of the whole cache.
        shards: shards of the plan; `shards_before` of them were there already.
        seconds: wall time of this run's shards.
        stats: what its processes did in this run, where their time went and what memory they took.
    """

    out: Path | str
    sequences: int
    rows: int
    shards: int
    shards_before: int
    seconds: float
    stats: RunStats = field(default_factory=RunStats)

    @property
    def already_done(self) -> bool:
        """True when there was nothing left to do."""
        return self.shards_before == self.shards


def build_cache(
    config: CacheConfig, *, on_progress: Progress = lambda stage, done, total: None, stop: Stop | None = None
) -> CacheResult:
    """Write the cache `config` describes, or what is missing of it, the way `config.engine` says.

    Args:
        config: teacher, corpus, sampler, directory, engine.
        on_progress: told (stage, done, total): stage `pack` counts documents (total 0: unknown), `cache` sequences.
        stop: whether to go on; by default nothing but the end of the work stops it.

    Raises:
        InputError: a teacher or corpus that can not be used.
        PlanMismatchError: the directory belongs to another run.
    """
    from stillroom.pipeline import engines  # which use `run_shards`
    from stillroom.pipeline.engines.stop import Stop

    return engines.build(config, on_progress, stop or Stop())


def run_shards(
    prepared: Prepared, shards: Iterable[int], on_progress: Progress = lambda stage, done, total: None
) -> RunStats:
    """Make these shards, here; those that are committed are passed over. Returns when the last is committed.

    What the teacher gave for a shard is kept in a journal until the commit, and what is in one already is not asked for again: a
    kill costs the batches that are at the teacher (one, on CUDA two), wherever the run goes on.

    In memory at a time: one shard being filled, one that waits for the writer's thread and one that it writes; and on the
    teacher's device two batches and one buffer of logits.

    Args:
        prepared: what `prepare` gave, in this process or another.
        shards: indices, in the order to make them.
        on_progress: told (`cache`, sequences the cache has, sequences of the cache).

    Raises:
        InputError: the teacher can not be loaded or sampled.
        OSError, CacheError: the disk or the store refused.
    """
    manifest, config, writer = prepared.manifest, prepared.config, prepared.writer()
    before = writer.committed()
    start_s, had = time.perf_counter(), sum(_length(manifest, shard) for shard in before)
    teacher = prepared.teacher()
    clock = StageClock(teacher.device)
    sampling = Sampling(
        teacher, prepared.spec, batch_size=config.batch_size, skip_bad_rows=config.skip_bad_rows, clock=clock
    )
    made = sequences = taken_up = bad_rows = counted = 0
    with writer:  # encodes and flushes one shard while the teacher runs on the next
        for shard in shards:
            if shard in before:
                continue
            first, stop = manifest.shard_range(shard)
            tokens_SL1, starts_SL1 = prepared.corpus.tokens_SL1[first:stop], prepared.corpus.starts_SL1
            starts_SL1 = None if starts_SL1 is None else starts_SL1[first:stop]
            kept = writer.journals.take_up(shard, bad_rows=config.skip_bad_rows)
            parts, known = [item.targets for item in kept], sum(item.sequences for item in kept)
            sequences, taken_up = sequences + known, taken_up + known
            bad_rows += sum(item.bad_rows for item in kept)
            with writer.journals.begin(shard, known) as journal:
                for batch, targets in sampling(_batches(prepared, shard, known)):
                    parts.append(targets)
                    with clock.host("copy"):
                        journal.append(len(batch), targets, sampling.bad_rows - counted)
                    sequences, counted = sequences + len(batch), sampling.bad_rows
                    on_progress("cache", had + sequences, manifest.sequences)
            rounding_R3 = _rounding(prepared.spec.seed, np.arange(first, stop), config.seq_len)
            with clock.host("wait"):
                writer.submit(shard, tokens_SL1, SparseTargets.concat(parts), rounding_R3, starts_SL1)
            made += 1
        with clock.host("wait"):
            writer.close()
    clock.add("encode", writer.encode_s)
    clock.add("commit", writer.commit_s)
    host, device = peak_bytes()
    return RunStats(
        shards=made,
        sequences=sequences,
        seconds=time.perf_counter() - start_s,
        stages=clock.seconds(),
        bad_rows=bad_rows + sampling.bad_rows,
        peak_host_bytes=host,
        peak_device_bytes=device,
        notes=prepared.corpus.notes + tuple(sampling.notes),
        taken_up=taken_up,
    )


def _batches(prepared: Prepared, shard: int, known: int) -> Iterator[Batch]:
    """The sequences of a shard behind the first `known`, in batches of the run's size."""
    first, stop = prepared.manifest.shard_range(shard)
    first, corpus = first + known, prepared.corpus
    keep_SL = None if corpus.mask_SL is None else corpus.mask_SL[first:stop]
    positions_SL = None if corpus.starts_SL1 is None else positions_of(corpus.starts_SL1[first:stop])
    whole = Batch(first, corpus.tokens_SL1[first:stop], positions_SL, keep_SL)
    for batch in whole.split(prepared.config.batch_size):
        logger.debug("shard %d: sequences from %d, %d of them, go to the teacher", shard, batch.first, len(batch))
        yield batch


def _rounding(seed: int, sequences_S: npt.NDArray[np.int64], rows: int) -> npt.NDArray[np.float64]:
    sequence_R = torch.from_numpy(np.repeat(sequences_S.astype(np.int64), rows))
    row_R = torch.arange(rows).repeat(len(sequences_S))
    result: npt.NDArray[np.float64] = uniforms(
        seed, sequence_R, row_R, stream=ROUNDING_STREAM, count=ROUNDING_UNIFORMS
    ).numpy()
    return result


def _length(manifest: Manifest, shard: int) -> int:
    first, stop = manifest.shard_range(shard)
    return stop - first
