"""The run of stage one: the plan, then one shard after another, each a pure function of (manifest, shard index).

Data flow: packed tokens -> teacher logits, one sequence at a time -> sampler -> CSR rows of a shard -> encode and commit.
Shapes: `S` sequences of a shard, `L` rows per sequence, `R` = S * L rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch

from stillroom.kernels.sample import uniforms
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.prepare import Prepared, Progress
from stillroom.pipeline.stages import sample_sequences
from stillroom.storage.manifest import Manifest
from stillroom.storage.targets import SparseTargets

if TYPE_CHECKING:
    from stillroom.pipeline.engines.stop import Stop

ROUNDING_STREAM: Final = 1  # stream 0 draws the targets; this one rounds them to codes
ROUNDING_UNIFORMS: Final = 3


@dataclass(frozen=True, slots=True)
class RunStats:
    """What one process did.

    Attributes:
        shards, sequences: made and committed here.
        seconds: wall time.
    """

    shards: int
    sequences: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What a run of stage one did.

    Attributes:
        out: directory or URL of the cache.
        sequences, rows: size of the whole cache.
        shards: shards of the plan; `shards_before` of them were there already.
        seconds: wall time of this run's shards.
    """

    out: Path | str
    sequences: int
    rows: int
    shards: int
    shards_before: int
    seconds: float

    @property
    def already_done(self) -> bool:
        """True when there was nothing left to do."""
        return self.shards_before == self.shards


def build_cache(
    config: CacheConfig, *, on_progress: Progress = lambda stage, done, total: None, stop: Stop | None = None
) -> CacheResult:
    """Write the cache `config` describes, or what is missing of it.

    Args:
        config: teacher, corpus, sampler, directory, engine.
        on_progress: told (stage, done, total): stage `pack` counts documents (total 0: unknown), `cache` sequences.
        stop: an entered `Stop`: SIGTERM finishes the shard in hand and raises.

    Raises:
        InputError: a teacher, corpus or engine that can not be used.
        PlanMismatchError: the directory belongs to another run.
        Terminated: SIGTERM came, and `stop` was given.
    """
    from stillroom.pipeline import engines  # they are ways around `run_shards`
    from stillroom.pipeline.engines.stop import Stop

    return engines.build(config, on_progress, stop or Stop())


def run_shards(
    prepared: Prepared, shards: Iterable[int], on_progress: Progress = lambda stage, done, total: None
) -> RunStats:
    """Make these shards, here; those that are committed are passed over. Returns when the last is committed.

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
    start_s, done = time.perf_counter(), sum(_length(manifest, shard) for shard in before)
    made, sequences = 0, 0
    with writer:  # encodes and flushes one shard while the teacher runs on the next
        for shard in shards:
            if shard in before:
                continue
            first, stop = manifest.shard_range(shard)
            tokens_SL1 = prepared.corpus.tokens_SL1[first:stop]
            parts = []
            for begin in range(0, len(tokens_SL1), config.batch_size):
                batch_BL1 = tokens_SL1[begin : begin + config.batch_size]
                parts += sample_sequences(
                    prepared.teacher(), prepared.spec, batch_BL1, first + begin, batch_size=config.batch_size
                )
                on_progress("cache", done + sequences + begin + len(batch_BL1), manifest.sequences)
            rounding_R3 = _rounding(prepared.spec.seed, np.arange(first, stop), config.seq_len)
            writer.submit(shard, tokens_SL1, SparseTargets.concat(parts), rounding_R3)
            made, sequences = made + 1, sequences + len(tokens_SL1)
    return RunStats(shards=made, sequences=sequences, seconds=time.perf_counter() - start_s)


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
