"""Are draws of different rows independent, without a teacher: does the lowest sampled id of a row tell of another row's.

The lowest id a row drew goes up with its random number, whatever the row. Where two sequences had the same random numbers,
their rows of the same number go up and down together; rows of different numbers say what is chance. Pairs are sequences at one
place of two shards (so a key that forgets the shard shows); rows that read or expect the same token are left out, since
one text repeated has one distribution.

Shapes: `S` sequences, `L` rows of one, `P` pairs of sequences, `R` rows, `E` entries.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.audit.findings.test import Test
from stillroom.pipeline.audit.record import Record
from stillroom.storage.codes import logp_scale
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import Manifest

FEWEST: Final = 500  # pairs of rows
FEWEST_SHIFTS: Final = 15


def independence(manifest: Manifest, record: Record) -> list[Test]:
    """One test, where the sampler draws and there are pairs enough."""
    if manifest.sampler.kind in TOP_KINDS or not record.rows:
        return []
    low_SL, label_SL, sequence_S = _grid(manifest, record)
    pairs_P2 = _pairs(manifest, sequence_S)
    length = low_SL.shape[1]
    if not len(pairs_P2) or length <= FEWEST_SHIFTS:
        return []
    low_SL = low_SL - np.nanmean(np.vstack([low_SL, np.zeros(length)]), axis=0)  # a row of zeros: no column is empty
    before_SL = np.roll(label_SL, 1, axis=1)  # what a row reads is the label before
    scores, many = [], []
    left, right = pairs_P2[:, 0], pairs_P2[:, 1]
    for shift in range(length):
        other = np.roll(low_SL[right], -shift, axis=1)
        differ = (label_SL[left] != np.roll(label_SL[right], -shift, axis=1)) & (
            before_SL[left] != np.roll(before_SL[right], -shift, axis=1)
        )
        product = np.where(differ, low_SL[left] * other, np.nan)
        has = np.isfinite(product)
        many.append(int(has.sum()))
        scores.append(float(product[has].mean()) if has.any() else 0.0)
    if many[0] < FEWEST:
        return []
    chance = np.array(scores[1:])
    z = max(0.0, (scores[0] - float(chance.mean())) / max(float(chance.std(ddof=1)), 1e-12))
    return [Test(
        name="seed.alike",
        what="how far the lowest sampled ids of like rows of two sequences go together, in standard deviations",
        statistic=z,
        p=math.exp(-min(z * z / 2, 700.0)),
        says=f"rows of the same number in different sequences drew alike ({z:.1f} standard deviations beyond others)",
        consequence="noise of the sample no longer averages out over rows: the student learns it",
        remedy="key the generator by seed, sequence and row (`stillroom cache` does), and make the cache again",
        figures={"pairs": many[0]},
    )]  # fmt: skip


def _grid(
    manifest: Manifest, record: Record
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lowest sampled id of each row as a rank in [0, 1], `[S, L]`, NaN where none was; labels, -1 where no row is."""
    sequence_S, place_R = np.unique(record.sequence_R, return_inverse=True)
    length = manifest.packing.seq_len
    sampled_E = np.ones(len(record.id_E), np.bool_)
    if manifest.sampler.kind == "threshold":
        pivot = float(logp_scale(manifest.sampler.draws).pivot_logp)
        sampled_E = np.isnan(record.logp_E) | (record.logp_E < pivot)
    lowest_R = np.full(record.rows, np.iinfo(np.int64).max)
    np.minimum.at(lowest_R, record.row_E[sampled_E], record.id_E[sampled_E])
    has_R = lowest_R < np.iinfo(np.int64).max
    rank_R = np.full(record.rows, np.nan)
    rank_R[has_R] = lowest_R[has_R].argsort(kind="stable").argsort() / max(1, int(has_R.sum()))
    low_SL, label_SL = np.full((len(sequence_S), length), np.nan), np.full((len(sequence_S), length), -1, np.int64)
    low_SL[place_R, record.row_R] = rank_R
    label_SL[place_R, record.row_R] = record.label_R
    return low_SL, label_SL, sequence_S


def _pairs(manifest: Manifest, sequence_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Disjoint pairs of sequences at one place of two shards; of any two where there is one shard."""
    place_S = sequence_S % manifest.sequences_per_shard
    if sequence_S[-1] < manifest.sequences_per_shard:
        place_S = np.zeros_like(place_S)
    pairs = []
    for place in np.unique(place_S):
        same = np.flatnonzero(place_S == place)
        pairs.append(same[: len(same) // 2 * 2].reshape(-1, 2))
    return np.concatenate(pairs)
