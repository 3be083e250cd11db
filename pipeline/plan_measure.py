"""What a plan measures: a run of stage one in small, in a temporary directory, and a survey of what it could keep instead.

Shapes: `S` measured sequences, `L` rows of a sequence, `P` probe rows, `K` entries of a top-k row.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from stillroom.pipeline.engines.joined import check_engine, joined
from stillroom.pipeline.engines.ranks import place
from stillroom.pipeline.intervals import Estimate, mean_of
from stillroom.pipeline.noise import squared_error, squared_errors
from stillroom.pipeline.plan_config import PlanConfig
from stillroom.pipeline.prepare import Progress, prepare
from stillroom.pipeline.probe import PROBE_SEQUENCES, Probe, probe
from stillroom.pipeline.run import run_shards
from stillroom.storage.cache import open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import Manifest
from stillroom.storage.sizes import Weight, weigh
from stillroom.storage.spec import MAX_DRAWS, SamplerSpec
from stillroom.storage.targets import SparseTargets

UNBIASED: Final = ("threshold", "systematic", "stratified", "random")
MEASURE_ROWS: Final = 8192
MEASURE_SEQUENCES: Final = 8  # at least, for the interval
MEASURE_SHARDS: Final = 4  # so that encoding lies beside the teacher, as it does in the run
NOISE_DRAWS: Final = (10, 25, 50, 100, 256)


@dataclass(frozen=True, slots=True)
class NoiseLine:
    """What a number of draws buys.

    Attributes:
        draws: N.
        entries_per_row, bytes_per_row: of the plan's sampler with N draws; bytes are the measured ones plus the difference
            that N makes on the probe rows, really encoded.
        squared_error: per sampler, expected squared distance of a row's target from the teacher (`noise`).
        relative_noise: per sampler, standard deviation of the gradient's noise as a part of that of a label drawn from the
            teacher, i.e. of plain cross-entropy.
    """

    draws: int
    entries_per_row: float
    bytes_per_row: float
    squared_error: dict[str, float]
    relative_noise: dict[str, float]


@dataclass(frozen=True, slots=True)
class TopKLine:
    """Top-k that takes as many bytes as the plan's sampler, on the probe rows.

    Attributes:
        k: the largest whose rows take no more bytes.
        bytes_per_row: of it; `bytes_per_row_here` of the plan's sampler. Without a shard's fixed part.
        kept_mass, lost_mass: mean probability that its entries hold, and that they do not.
        squared_bias: mean squared distance from the teacher where the missing mass is left missing; it does not fall as
            rows are averaged. `squared_bias_renormalised`: where the rest is scaled up to one.
        squared_error_here: mean expected squared error of the plan's sampler, all of it noise.
        rows_to_beat: rows over which the sampler's error averages to less than top-k's squared bias; None where that has none.
    """

    k: int
    bytes_per_row: float
    bytes_per_row_here: float
    kept_mass: float
    lost_mass: float
    squared_bias: float
    squared_bias_renormalised: float
    squared_error_here: float
    rows_to_beat: float | None


@dataclass(frozen=True, slots=True)
class Measurement:
    """A run in small.

    Attributes:
        manifest: of the cache it wrote, sampler solved.
        sequences, rows, probe_rows, seconds: what was measured, and how long the run took.
        device, dtype: the teacher's.
        entries_per_row, bytes_per_row: means over sequences, with intervals.
        bytes_by_array: means; `shard` is what a shard has once, spread over the rows of one of the size asked for.
        rows_per_s: of the run, encoding and commit included.
        rows_with_targets: share of rows inside the loss mask.
        noise: lines for `NOISE_DRAWS` and the plan's own number of draws.
        top_k: None where the plan's sampler is one.
    """

    manifest: Manifest
    sequences: int
    rows: int
    probe_rows: int
    seconds: float
    device: str
    dtype: str
    entries_per_row: Estimate
    bytes_per_row: Estimate
    bytes_by_array: dict[str, float]
    rows_per_s: float
    rows_with_targets: float
    noise: tuple[NoiseLine, ...]
    top_k: TopKLine | None


def measure(config: PlanConfig, on_progress: Progress) -> Measurement:
    """Make a small cache as the run would, weigh it, and throw it away.

    Args:
        config: what `stillroom cache` would get, and how many sequences to run.
        on_progress: as for `prepare` and `run_shards`.

    Raises:
        InputError: a teacher or corpus that can not be used, or too short to measure.
    """
    wanted = config.measure_sequences or max(MEASURE_SEQUENCES, -(-MEASURE_ROWS // config.seq_len))
    if config.entries_per_row is not None:  # solved on the sequences the run will solve it on
        wanted = max(wanted, PROBE_SEQUENCES)
    if config.max_sequences is not None:
        wanted = min(wanted, config.max_sequences)
    check_engine(config)
    with joined(config, place(config)) as (_, group), tempfile.TemporaryDirectory() as folder:
        per_shard = max(config.batch_size, -(-wanted // MEASURE_SHARDS))
        small = {"out": Path(folder) / "cache", "max_sequences": wanted, "sequences_per_shard": per_shard}
        prepared = prepare(config.model_copy(update=small), on_progress, group)
        teacher, manifest, corpus = prepared.teacher(), prepared.manifest, prepared.corpus
        if manifest.sequences < 2:
            raise InputError(
                f"{config.data} gives one sequence of {config.seq_len} rows, wanted at least 2 to measure: "
                "add text, lower --seq-len, or give --rows-per-s and --bytes-per-row"
            )
        rows = probe(teacher, corpus, batch_size=config.batch_size)  # the teacher is warm after it
        start_s = time.perf_counter()
        run_shards(prepared, range(manifest.shards), on_progress)
        seconds = time.perf_counter() - start_s
        cache = open_cache(prepared.config.out, columns=())
        weight = weigh(cache)
        offsets = cache.read(range(len(cache))).targets.offsets
    seq_len = manifest.packing.seq_len
    count = manifest.sequences * seq_len
    shard_bytes = weight.per_shard / (config.sequences_per_shard * seq_len)
    bytes_per_row = mean_of(weight.sequences / seq_len + shard_bytes)
    noise = noise_lines(rows, manifest, bytes_per_row.value)
    return Measurement(
        manifest=manifest,
        sequences=manifest.sequences,
        rows=count,
        probe_rows=rows.rows,
        seconds=seconds,
        device=str(teacher.device),
        dtype=manifest.teacher.dtype,
        entries_per_row=mean_of(np.diff(offsets[::seq_len]) / seq_len),
        bytes_per_row=bytes_per_row,
        bytes_by_array=_by_array(weight, seq_len, shard_bytes),
        rows_per_s=count / seconds,
        rows_with_targets=1.0 if corpus.mask_SL is None else float(corpus.mask_SL.mean()),
        noise=noise,
        top_k=None if manifest.sampler.kind in ("top_k", "top_p") else top_k_line(rows, manifest),
    )


def _by_array(weight: Weight, seq_len: int, shard_bytes: float) -> dict[str, float]:
    return {name: float(size_S.mean()) / seq_len for name, size_S in weight.by_array.items()} | {"shard": shard_bytes}


def noise_lines(rows: Probe, manifest: Manifest, bytes_per_row: float) -> tuple[NoiseLine, ...]:
    """What `NOISE_DRAWS` and the manifest's own number of draws buy, on the probe rows; it weighs `bytes_per_row` now."""
    spec = manifest.sampler
    label = float(squared_error(rows.logits_PV, "random", 1).mean())

    def encoded(draws: int) -> tuple[float, float]:
        made = replace(spec, draws=draws)
        targets = rows.sample(made)
        return targets.entries / rows.rows, rows.bytes_of(manifest, made, targets)

    _, here = encoded(spec.draws)
    table = sorted({*NOISE_DRAWS, spec.draws})
    asked = [(kind, draws) for draws in table for kind in UNBIASED]
    means = dict(zip(asked, (float(each.mean()) for each in squared_errors(rows.logits_PV, asked)), strict=True))
    lines = []
    for draws in table:
        errors = {kind: means[kind, draws] for kind in UNBIASED}
        if spec.exponent != 1.0:
            own = squared_error(rows.logits_PV, "random", draws, exponent=spec.exponent)
            errors[f"random, exponent {spec.exponent:g}"] = float(own.mean())
        relative = {kind: (error / label) ** 0.5 if label else 0.0 for kind, error in errors.items()}
        entries, there = encoded(draws)
        lines.append(NoiseLine(draws, entries, bytes_per_row + there - here, errors, relative))
    return tuple(lines)


def top_k_line(rows: Probe, manifest: Manifest) -> TopKLine:
    """Top-k that takes as many bytes as the manifest's sampler, on the probe rows."""
    spec = manifest.sampler
    targets = rows.sample(spec)
    here = rows.bytes_of(manifest, spec, targets)
    top = SamplerSpec(
        kind="top_k", draws=min(MAX_DRAWS, 4 * -(-targets.entries // rows.rows) + 16, manifest.vocab_size)
    )
    most = rows.sample(top)

    def at(k: int) -> tuple[SparseTargets, float]:
        first = _first(most, k)
        return first, rows.bytes_of(manifest, replace(top, draws=k), first)

    low, high = 1, top.draws
    while low < high:  # the largest k that takes no more bytes
        middle = (low + high + 1) // 2
        low, high = (middle, high) if at(middle)[1] <= here else (low, middle - 1)
    kept, size = at(low)
    row_E = np.repeat(np.arange(rows.rows), np.diff(kept.offsets))
    mass_P = np.bincount(row_E, kept.weights, rows.rows)
    square_P = np.bincount(row_E, kept.weights.astype(np.float64) ** 2, rows.rows)
    out_P = squared_error(rows.logits_PV, "top_k", low).numpy()
    bias = float(out_P.mean())
    error = float(squared_error(rows.logits_PV, spec.kind, spec.draws, exponent=spec.exponent).mean())
    return TopKLine(
        k=low,
        bytes_per_row=size,
        bytes_per_row_here=here,
        kept_mass=float(mass_P.mean()),
        lost_mass=float(np.maximum(0.0, 1.0 - mass_P).mean()),
        squared_bias=bias,
        squared_bias_renormalised=float((square_P * (1 / mass_P - 1) ** 2 + out_P).mean()),
        squared_error_here=error,
        rows_to_beat=error / bias if bias else None,
    )


def _first(targets: SparseTargets, k: int) -> SparseTargets:
    """The first `k` entries of every row: what the sampler keeps with `draws=k`."""
    n_P = np.diff(targets.offsets)
    keep_E = np.arange(targets.entries) - np.repeat(targets.offsets[:-1], n_P) < k
    assert targets.logp is not None  # top_k keeps it
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(np.minimum(n_P, k))]),
        ids=targets.ids[keep_E],
        weights=targets.weights[keep_E],
        label_logp=targets.label_logp,
        entropy=targets.entropy,
        logp=targets.logp[keep_E],
    )
