"""The audit itself: choose, scan, recompute, test, measure.

Shapes: `V` vocabulary, `R` rows.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Final

import numpy as np

from stillroom.pipeline.audit.config import AuditConfig
from stillroom.pipeline.audit.facts import Facts
from stillroom.pipeline.audit.findings.alignment import alignment
from stillroom.pipeline.audit.findings.bias import bias
from stillroom.pipeline.audit.findings.drift import by_group, drift
from stillroom.pipeline.audit.findings.groups import calibration_of_shards
from stillroom.pipeline.audit.findings.independence import independence
from stillroom.pipeline.audit.findings.seeds import reproduced, seeds
from stillroom.pipeline.audit.findings.sequences import Scan, scan, sequences
from stillroom.pipeline.audit.findings.stored import stored
from stillroom.pipeline.audit.findings.test import Test, certain, judge
from stillroom.pipeline.audit.measures import measures_of_facts, measures_of_record
from stillroom.pipeline.audit.pick import pick
from stillroom.pipeline.audit.recompute import Progress, claim, recompute, teacher_of
from stillroom.pipeline.audit.record import Record
from stillroom.pipeline.audit.result import AuditResult
from stillroom.pipeline.audit.worth import worth
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.cache import Cache, open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import Manifest

LIBRARIES: Final = ("stillroom", "torch", "transformers", "numpy")
ALONE_FACTOR: Final = 8  # rows cost little where no teacher runs


def audit(config: AuditConfig, on_progress: Progress = lambda stage, done, total: None) -> AuditResult:
    """Audit a cache.

    Args:
        config: what to compare with what.
        on_progress: told (stage, done, total): `scan` counts shards, `recompute` and `gradient` sequences.

    Raises:
        InputError: no teacher, another vocabulary, a folder that is taken, nothing to audit.
        CacheError: not a cache.
    """
    start_s = time.monotonic()
    cache = open_cache(config.cache, partial=True)
    manifest = cache.manifest
    rows = config.rows * (ALONE_FACTOR if config.no_teacher else 1)
    indices, damaged = pick(cache, rows, config.seed)
    if not indices:
        what = f" ({next(iter(damaged.values()))})" if damaged else ": it has no committed shard"
        raise InputError(
            f"{config.cache} holds no sequence that can be read{what}: run `stillroom cache` or `verify` first"
        )
    teacher, tokenizer = (None, None) if config.no_teacher else teacher_of(config, manifest)
    if config.out is not None:
        claim(config, cache, teacher, indices)
    found = scan(cache, config.scan, config.seed, lambda done, total: on_progress("scan", done, total))
    found.damaged.update(damaged)
    record = Record.read(cache, indices)
    notes = _notes(config, cache, record, found, teacher)
    tests = [
        *sequences(found),
        *stored(manifest, record),
        *independence(manifest, record),
        *calibration_of_shards(cache),
    ]
    facts = None
    if teacher is not None:
        facts = recompute(config, cache, teacher, indices, on_progress)
        tests += tests_of(manifest, facts, _unigram(found, manifest), _writers(cache))
        tests += _tokenizer(manifest, tokenizer)
        notes += _teacher_notes(manifest, teacher, facts)
    measures: dict[str, Any] = {}
    if config.measures:
        measures = measures_of_record(cache, record, found)
        if facts is not None and teacher is not None:
            measures |= measures_of_facts(manifest, facts)
            measures |= worth(config, cache, teacher, indices, on_progress)
    result = AuditResult(
        cache=str(config.cache),
        made={"manifest": _plain_manifest(manifest), "identity": manifest.identity},
        teacher=None if teacher is None else {
            "name": teacher.name, "fingerprint": teacher.fingerprint, "dtype": str(teacher.dtype).removeprefix("torch."),
            "device": str(teacher.device), "batch_size": config.batch_size,
        },
        rows=record.rows,
        rows_asked=rows,
        sequences=len(indices),
        shards=len({cache.shard_of(index) for index in indices}),
        seed=config.seed,
        tests=tuple(judge(tests)),
        measures=measures,
        notes=tuple(notes),
        seconds=time.monotonic() - start_s,
        libraries={name: version(name) for name in LIBRARIES},
    )  # fmt: skip
    if config.out is not None:
        result.save(config.out)
    return result


def tests_of(
    manifest: Manifest, facts: Facts, unigram_V: np.ndarray[tuple[int], np.dtype[np.float64]], writers: dict[int, str]
) -> list[Test]:
    """All tests that compare rows with the recomputed teacher.

    Args:
        manifest: of the cache.
        facts: of the rows.
        unigram_V: frequencies of ids in the text.
        writers: of each shard, who wrote it.
    """
    shards = {int(shard): f"shard|[{shard}]" for shard in np.unique(facts.shard_R)}
    names = sorted({writers.get(shard, "") for shard in shards})
    writer_R = np.array([names.index(writers.get(int(shard), "")) for shard in facts.shard_R], np.int64)
    return [
        *drift(manifest, facts),
        *by_group(manifest, facts, facts.shard_R, shards),
        *by_group(manifest, facts, writer_R, {number: f"writer|[{name}]" for number, name in enumerate(names)}),
        *alignment(facts, unigram_V),
        *bias(manifest, facts),
        *seeds(manifest, facts),
    ]


def unigram(counts_V: np.ndarray[Any, np.dtype[Any]], vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Frequencies of ids, smoothed so that none is 0."""
    smoothed_V = counts_V[:vocab_size].astype(np.float64) + 0.5
    if len(smoothed_V) < vocab_size:
        smoothed_V = np.pad(smoothed_V, (0, vocab_size - len(smoothed_V)), constant_values=0.5)
    result: np.ndarray[tuple[int], np.dtype[np.float64]] = smoothed_V / smoothed_V.sum()
    return result


def _unigram(found: Scan, manifest: Manifest) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return unigram(found.unigram_V, manifest.vocab_size)


def _writers(cache: Cache) -> dict[int, str]:
    """Versions that wrote each shard, as far as its record says."""
    return {shard: json.dumps(cache.record(shard).libraries, sort_keys=True) for shard in cache.shards}


def _tokenizer(manifest: Manifest, fingerprint: str | None) -> list[Test]:
    if fingerprint is None:
        return []
    other = fingerprint != manifest.tokenizer.fingerprint
    return [Test(
        name="tokenizer.fingerprint",
        what="whether the teacher's tokenizer is another than the cache's",
        statistic=float(other),
        p=certain(other),
        says=f"the tokenizer beside the teacher ({fingerprint[:12]}) is not the one the text was cut with "
        f"({manifest.tokenizer.fingerprint[:12]})",
        consequence="ids mean other text to the teacher than to the corpus, and to every student checked against either",
        remedy="use the teacher's own tokenizer; if its file was only saved by another version, audit with that",
    )]  # fmt: skip


def _notes(config: AuditConfig, cache: Cache, record: Record, found: Scan, teacher: Teacher | None) -> list[str]:
    manifest, notes = cache.manifest, []
    if len(cache.shards) < manifest.shards:
        notes.append(
            f"the cache is incomplete: {len(cache.shards)} of {manifest.shards} shards are committed, and were audited"
        )
    asked = config.rows * (ALONE_FACTOR if teacher is None else 1)
    if record.rows < asked and len(cache) * manifest.packing.seq_len < asked:
        notes.append(
            f"{asked:,} rows were asked for, the cache holds {record.rows:,} with a target in what can be read"
        )
    if found.sequences < len(cache):
        notes.append(f"tokens of {found.sequences:,} of {len(cache):,} sequences were compared (--scan)")
    if found.repeated > found.copied:
        notes.append(
            f"{found.repeated:,} sequences repeat another's text with draws of their own: the corpus repeats itself"
        )
    return notes


def _teacher_notes(manifest: Manifest, teacher: Teacher, facts: Facts) -> list[str]:
    notes = []
    dtype = str(teacher.dtype).removeprefix("torch.")
    if dtype != manifest.teacher.dtype:
        made = "one that is not known" if manifest.teacher.dtype == "unknown" else manifest.teacher.dtype
        notes.append(
            f"the teacher ran in {dtype}, the cache was made in {made}: deviations that such a change of dtype explains may show"
        )
    elif teacher.fingerprint != manifest.teacher.fingerprint:
        notes.append(
            f"the teacher's fingerprint is {teacher.fingerprint[:12]}, the manifest's "
            f"{manifest.teacher.fingerprint[:12]}: its weights or settings are not bit for bit those the cache names"
        )
    share = reproduced(facts)
    if share is not None:
        notes.append(f"the manifest's seed makes {share:.1%} of the drawn tails again")
    return notes


def _plain_manifest(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in asdict(manifest).items() if key != "format_version"}
