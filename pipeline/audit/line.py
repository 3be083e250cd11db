"""One line of audit: does the cache still agree with its teacher, and are its weights unbiased?

Shapes: `L` rows of a sequence, `V` vocabulary, `G` probability buckets.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from stillroom.pipeline.teacher import Teacher
from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.segments import positions_of

BUCKET_EDGES: Final = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0 + 1e-6)
# Chance that a sound cache is called biased: two-sided normal tail over all buckets together.
FALSE_ALARM: Final = 1e-3
# Rounding of the stored label log-probability plus float32 noise of a recomputed forward, nats.
LABEL_TOLERANCE: Final = 0.02


@dataclass(frozen=True, slots=True)
class AuditLine:
    """A cache compared with its recomputed teacher.

    Attributes:
        rows: rows recomputed.
        label_gap: largest |stored - recomputed| label log-probability, nats.
        z_G: per probability bucket of the teacher, the mean over rows of (kept weight - true mass) in standard errors.
        z_limit: bound on |z| that a sound cache exceeds with probability 1e-3 per audit.
        kept_mass: mean teacher probability of the kept ids.
        squared_error: mean over rows of the squared distance between target and teacher.
    """

    rows: int
    label_gap: float
    z_G: tuple[float, ...]
    z_limit: float
    kept_mass: float
    squared_error: float

    @property
    def sound(self) -> bool:
        """No drift and no bias beyond chance."""
        return self.label_gap <= LABEL_TOLERANCE and max(map(abs, self.z_G)) <= self.z_limit

    def __str__(self) -> str:
        return (
            f"audit: {'sound' if self.sound else 'NOT SOUND'}: {self.rows:,} rows recomputed, "
            f"label log p off by at most {self.label_gap:.4f} nats, "
            f"bias by probability bucket at most {max(map(abs, self.z_G)):.1f} standard errors (limit {self.z_limit:.1f}), "
            f"kept mass {self.kept_mass:.3f}, squared error {self.squared_error:.5f} a row"
        )


def audit_line(cache: Cache, teacher: Teacher, *, sequences: int = 8, seed: int = 0) -> AuditLine:
    """Recompute the teacher on a random sample of sequences and compare.

    Args:
        cache: any cache.
        teacher: the teacher it claims.
        sequences: how many sequences to recompute.
        seed: which ones.

    Raises:
        InputError: the teacher has another vocabulary.
    """
    if teacher.vocab_size != cache.manifest.vocab_size:
        raise InputError(
            f"teacher {teacher.name} has {teacher.vocab_size} ids, the cache was made with {cache.manifest.vocab_size}: "
            "audit it with the teacher that made it"
        )
    chosen = np.random.default_rng(seed).permutation(len(cache))[:sequences]
    excess_RG, label_gap, kept, squared = [], 0.0, [], []
    for index in chosen:
        item = cache[int(index)]
        tokens_L1 = torch.from_numpy(item.tokens.astype(np.int64))
        starts = cache.starts([int(index)])
        positions = None if starts is None else torch.from_numpy(positions_of(starts))
        kept_L = np.diff(item.targets.offsets) > 0  # rows outside the loss mask keep nothing, and promise nothing
        if not kept_L.any():
            continue
        logits_LV = teacher.head(teacher.body(tokens_L1[None, :-1], positions)[0])
        logp_LV = logits_LV.double().log_softmax(-1).cpu().numpy()[kept_L]
        p_LV = np.exp(logp_LV)
        label_L = logp_LV[np.arange(len(p_LV)), item.tokens[1:].astype(np.int64)[kept_L]]
        label_gap = max(label_gap, float(np.abs(label_L - item.targets.label_logp[kept_L]).max()))
        row_E = np.repeat(np.arange(len(p_LV)), np.diff(item.targets.offsets)[kept_L])
        kept_p_E = p_LV[row_E, item.targets.ids]
        excess_RG.append(_excess(p_LV, row_E, kept_p_E, item.targets.weights))
        kept.append(np.bincount(row_E, kept_p_E, len(p_LV)))
        weight_E = item.targets.weights.astype(np.float64)
        squared.append((p_LV**2).sum(-1) + np.bincount(row_E, weight_E**2 - 2 * weight_E * kept_p_E, len(p_LV)))
    excess = np.concatenate(excess_RG)
    standard_error_G = excess.std(axis=0, ddof=1) / math.sqrt(len(excess))
    mean_G = excess.mean(axis=0)
    z_G = np.divide(mean_G, standard_error_G, out=np.zeros_like(mean_G), where=standard_error_G > 0)
    limit = float(-torch.special.ndtri(torch.tensor(FALSE_ALARM / 2 / len(z_G), dtype=torch.float64)))
    return AuditLine(
        rows=len(excess),
        label_gap=label_gap,
        z_G=tuple(float(z) for z in z_G),
        z_limit=limit,
        kept_mass=float(np.concatenate(kept).mean()),
        squared_error=float(np.concatenate(squared).mean()),
    )


def _excess(
    p_LV: npt.NDArray[np.float64],
    row_E: npt.NDArray[np.int64],
    p_E: npt.NDArray[np.float64],
    weight_E: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Kept weight minus true mass per row and probability bucket, `[L, G]`."""
    rows, buckets = len(p_LV), len(BUCKET_EDGES) - 1
    true_LG = np.stack(
        [np.where((p_LV >= low) & (p_LV < high), p_LV, 0.0).sum(-1) for low, high in itertools.pairwise(BUCKET_EDGES)],
        axis=1,
    )
    bucket_E = np.digitize(p_E, BUCKET_EDGES[1:-1])
    kept_LG = np.bincount(row_E * buckets + bucket_E, weight_E, rows * buckets).reshape(rows, buckets)
    result: npt.NDArray[np.float64] = kept_LG - true_LG
    return result
