"""What an audit keeps of a row once its logits are gone: a few numbers, and a few for each kept entry.

Everything a finding or a measure needs is in here, so that both are pure functions of arrays, and memory does not grow with
the vocabulary. Natural logarithms throughout; NaN stands for what the cache does not keep or the audit did not compute.

Shapes: `R` rows that have a target, `E` their entries, `G` buckets of all partitions side by side (`partition`),
`T` temperatures, `A` alignments (-2, -1, 1, 2), `W` widths of an id (16 and 17 bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ALIGNMENTS: Final = (-2, -1, 1, 2)
TEMPERATURES: Final = (0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5)
ID_BITS: Final = (16, 17)  # of ids that others pack, and wrap

FloatR = npt.NDArray[np.float64]
IntR = npt.NDArray[np.int64]
BoolR = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Cached rows beside the recomputed teacher.

    Attributes:
        sequence_R, shard_R, row_R: where the row is: sequence of the whole run, shard, row in the sequence.
        stored_label_R, stored_entropy_R: what the cache keeps.
        label_R, entropy_R: log-probability of the label and entropy of the recomputed teacher.
        control_label_R, control_entropy_R: of the control run.
        label_shift_RA: label log-probability had the label been the token A places further.
        square_R: sum of squared probabilities.
        confidence_R, hit_R: largest probability, and whether its id is the label.
        normaliser_RT: log sum p**(1/T).
        mass_RG: the teacher's mass in each bucket; `control_RG` the control run's less the teacher's.
        drawn_variance_RG: squared (weight - mass) of fresh draws in each bucket, mean over the draws; 0 where the sampler
            draws nothing.
        drawn_largest_RG: largest |weight - mass| among them.
        drawn_square_R, drawn_fisher_R: mean over fresh draws of the squared and the Fisher-weighted error of a row.
        drawn_top_R: how many of the fresh draws kept just the most likely ids.
        drawn_common_R: how many of them share half their tail with the cache's.
        same_own_R, same_shard_R, same_zero_R: whether the draw made with the manifest's seed does, keyed by the sequence, by its
            place in the shard, by 0. `replayed_R`: where that was computed.
        top_R: whether the cache keeps just the most likely ids. `tail_R`: entries below 1/N that it keeps.
        kept_R: true mass of the kept ids.
        guess_R, guess_hit_R: largest weight, and whether its id is the label.
        row_E: row of an entry. id_E, weight_E, stored_E (its log-probability as stored): the cache's entry.
        logp_E, control_E: log-probability of the recomputed teacher and of the control run.
        bucket_E3: its bucket in each partition.
        shift_EA: its log-probability A rows further on.
        wrapped_EW: log of the mass of all ids that have its low 16 or 17 bits.
        apart_E: its log-probability where documents are not told apart.
    """

    sequence_R: IntR
    shard_R: IntR
    row_R: IntR
    stored_label_R: FloatR
    stored_entropy_R: FloatR
    label_R: FloatR
    entropy_R: FloatR
    control_label_R: FloatR
    control_entropy_R: FloatR
    label_shift_RA: FloatR
    square_R: FloatR
    confidence_R: FloatR
    hit_R: BoolR
    normaliser_RT: FloatR
    mass_RG: FloatR
    control_RG: FloatR
    drawn_variance_RG: FloatR
    drawn_largest_RG: FloatR
    drawn_square_R: FloatR
    drawn_fisher_R: FloatR
    drawn_top_R: IntR
    drawn_common_R: IntR
    same_own_R: BoolR
    same_shard_R: BoolR
    same_zero_R: BoolR
    replayed_R: BoolR
    top_R: BoolR
    tail_R: IntR
    kept_R: FloatR
    guess_R: FloatR
    guess_hit_R: BoolR
    row_E: IntR
    id_E: IntR
    weight_E: FloatR
    stored_E: FloatR
    logp_E: FloatR
    control_E: FloatR
    bucket_E3: IntR
    shift_EA: FloatR
    wrapped_EW: FloatR
    apart_E: FloatR

    @property
    def rows(self) -> int:
        """Number of rows `R`."""
        return len(self.row_R)

    def sums(self, value_E: npt.NDArray[Any]) -> FloatR:
        """Sums of something of entries over each row, `[R]`."""
        return np.bincount(self.row_E, value_E.astype(np.float64), self.rows).astype(np.float64)

    def weight_RG(self) -> FloatR:
        """Kept weight in each bucket."""
        many = self.mass_RG.shape[1]
        kept = np.zeros(self.rows * many)
        for partition in range(self.bucket_E3.shape[1]):
            kept += np.bincount(self.row_E * many + self.bucket_E3[:, partition], self.weight_E, len(kept))
        return kept.reshape(self.rows, many)

    def only(self, rows_R: BoolR) -> Facts:
        """The facts of some rows."""
        entries_E, place_R = rows_R[self.row_E], np.cumsum(rows_R) - 1
        found = {
            item.name: getattr(self, item.name)[entries_E if _of_entries(item.name) else rows_R]
            for item in fields(self)
        }
        return Facts(**{**found, "row_E": place_R[found["row_E"]]})

    @staticmethod
    def concat(parts: Sequence[Facts]) -> Facts:
        """Rows after rows."""
        names = [item.name for item in fields(Facts)]
        before = np.cumsum([0, *(part.rows for part in parts)])
        moved = {
            name: np.concatenate([getattr(part, name) + (start if name == "row_E" else 0) if name == "row_E"
                                  else getattr(part, name) for part, start in zip(parts, before)])
            for name in names
        }  # fmt: skip
        return Facts(**moved)

    def save(self, file: Path) -> None:
        """Keep the arrays in a file, whole or not at all."""
        part = file.with_suffix(".part")
        with part.open("wb") as opened:
            np.savez(opened, **{item.name: getattr(self, item.name) for item in fields(self)})
        part.replace(file)

    @classmethod
    def load(cls, file: Path) -> Facts:
        """What `save` kept.

        Raises:
            ValueError, OSError, KeyError: it is no such file.
        """
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**{item.name: arrays[item.name] for item in fields(cls)})


def _of_entries(name: str) -> bool:
    return "_E" in name
