"""What a cache is worth, as numbers with intervals: mass, entries, errors against what the sampler promises, calibration, bytes.

Intervals are 95 %, over sequences (`pipeline.intervals`), since rows of one resemble each other.

Shapes: `R` rows, `E` entries, `S` sequences, `K` bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.audit.facts import Facts
from stillroom.pipeline.audit.findings.bias import buckets
from stillroom.pipeline.audit.findings.sequences import Scan
from stillroom.pipeline.audit.record import Record
from stillroom.pipeline.audit.reduce import errors
from stillroom.pipeline.intervals import ratio_of
from stillroom.storage.cache import Cache
from stillroom.storage.codes import logp_scale
from stillroom.storage.manifest import Manifest

BINS: Final = 15
ENTROPY_EDGES: Final = (0.0, 0.5, 1.5, 3.0, 5.0, np.inf)
POSITIONS: Final = 16

FloatR = npt.NDArray[np.float64]


def measures_of_record(cache: Cache, record: Record, found: Scan) -> dict[str, Any]:
    """What needs no teacher."""
    manifest = cache.manifest
    rows = len(cache) * manifest.packing.seq_len
    n_R = record.n_R.astype(np.float64)
    many, rows_of = np.unique(record.n_R, return_counts=True)
    place_R = record.row_R * POSITIONS // manifest.packing.seq_len
    pivot = float(logp_scale(manifest.sampler.draws).pivot_logp)
    head_E = np.isfinite(record.logp_E) & (record.logp_E >= pivot)
    hit_E = record.id_E == record.label_R[record.row_E]
    return {
        "bytes_by_array": {name: size / rows for name, size in cache.bytes_by_array().items()},
        "entries": {
            **_mean(n_R, record.sequence_R),
            "histogram": [[int(n), int(count)] for n, count in zip(many, rows_of)],
            "by_entropy": [
                {"from": low, "to": high, "rows": int(inside.sum()), **_mean(n_R[inside], record.sequence_R[inside])}
                for low, high, inside in _ranges(record.entropy_R, ENTROPY_EDGES)
            ],
        },
        "label_loss": _mean(-record.label_logp_R, record.sequence_R),
        "entropy": _mean(record.entropy_R, record.sequence_R),
        "by_position": [
            {"from": int(place * manifest.packing.seq_len // POSITIONS),
             "entropy": _mean(record.entropy_R[place_R == place], record.sequence_R[place_R == place]),
             "label_loss": _mean(-record.label_logp_R[place_R == place], record.sequence_R[place_R == place])}
            for place in np.unique(place_R)
        ],
        "by_shard": [
            {"shard": int(shard), "entropy": _mean(record.entropy_R[inside], record.sequence_R[inside]),
             "label_loss": _mean(-record.label_logp_R[inside], record.sequence_R[inside])}
            for shard in np.unique(record.shard_R) for inside in [record.shard_R == shard]
        ],
        # of every kept id that is exact: how often it is the label, against the probability beside it
        "reliability_of_head": reliability(np.exp(np.where(head_E, record.logp_E, 0.0))[head_E], hit_E[head_E]),
        "scan": {"sequences": found.sequences, "repeated": found.repeated, "copied": found.copied},
    }  # fmt: skip


def measures_of_facts(manifest: Manifest, facts: Facts) -> dict[str, Any]:
    """What the recomputed teacher tells."""
    squared_R, fisher_R = errors(facts.row_E, facts.weight_E, facts.logp_E, facts.square_R)
    sequence_R = facts.sequence_R
    return {
        "kept_mass": {
            **_mean(facts.kept_R, sequence_R),
            "by_entropy": [
                {"from": low, "to": high, "rows": int(inside.sum()), **_mean(facts.kept_R[inside], sequence_R[inside])}
                for low, high, inside in _ranges(facts.entropy_R, ENTROPY_EDGES)
            ],
        },
        "squared_error": _mean(squared_R, sequence_R) | {"predicted": _mean(facts.drawn_square_R, sequence_R)},
        "fisher_error": _mean(fisher_R, sequence_R) | {"predicted": _mean(facts.drawn_fisher_R, sequence_R)},
        "bias": [asdict(each) for each in buckets(manifest, facts)],
        "mass_by_rank": [
            {"name": each.name, "teacher": each.mass, "kept": each.mass + each.bias, "low": each.mass + each.low,
             "high": each.mass + each.high}
            for each in buckets(manifest, facts) if each.kind == "rank"
        ],
        "reliability_of_teacher": reliability(facts.confidence_R, facts.hit_R),
        "reliability_of_target": reliability(facts.guess_R, facts.guess_hit_R),
        "label_deviation": {
            "stored": _mean(np.abs(facts.stored_label_R - facts.label_R), sequence_R),
            "control": _mean(np.abs(facts.control_label_R - facts.label_R), sequence_R),
        },
    }  # fmt: skip


def reliability(confidence_R: FloatR, hit_R: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Expected calibration error over 15 bins ((b/15, (b+1)/15]), and the bins, hits with Wilson's 95 % interval (1927)."""
    bin_R = np.clip(np.ceil(confidence_R * BINS).astype(np.int64) - 1, 0, BINS - 1)
    many_K, sum_K = np.bincount(bin_R, minlength=BINS), np.bincount(bin_R, confidence_R, BINS)
    hits_K = np.bincount(bin_R, hit_R, BINS)
    bins = []
    for k in np.flatnonzero(many_K):
        n, share = float(many_K[k]), float(hits_K[k] / many_K[k])
        centre, spread = share + 1.92 / n, 1.96 * float(np.sqrt(share * (1 - share) / n + 0.9604 / n**2))
        bins.append({"confidence": float(sum_K[k] / n), "hits": share, "rows": int(n),
                     "low": (centre - spread) / (1 + 3.84 / n), "high": (centre + spread) / (1 + 3.84 / n)})  # fmt: skip
    return {"ece": float(np.abs(sum_K - hits_K).sum() / max(1, many_K.sum())), "bins": bins}


def _ranges(value_R: FloatR, edges: Sequence[float]) -> list[tuple[float, float | None, npt.NDArray[np.bool_]]]:
    result = []
    for low, high in pairwise(edges):
        inside_R = (value_R >= low) & (value_R < high)
        if inside_R.any():
            result.append((float(low), None if np.isinf(high) else float(high), inside_R))
    return result


def _mean(value_R: FloatR, sequence_R: npt.NDArray[np.int64]) -> dict[str, float | None]:
    """Mean over rows and its interval over sequences."""
    has_R = np.isfinite(value_R)
    if not has_R.any():
        return {"mean": None, "low": None, "high": None}
    _, group_R = np.unique(sequence_R[has_R], return_inverse=True)
    estimate = ratio_of(np.bincount(group_R, value_R[has_R]), np.bincount(group_R))
    known = np.isfinite(estimate.high)
    return {"mean": estimate.value, "low": estimate.low if known else None, "high": estimate.high if known else None}
