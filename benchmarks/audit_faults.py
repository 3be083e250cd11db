"""What goes wrong with caches, planted in one: every fault of the power study, one function each.

A fault is planted in targets as they are read back, or in the logits they are drawn from. Each function takes a scene, the
number of the trial and its generator.

Shapes: `N` rows, `E` entries, `L` rows of a sequence, `B` sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.audit_scenes import LENGTH, Fault, Scene, rows_from
from stillroom.pipeline.audit.draws import entry_rows
from stillroom.storage.spec import SamplerKind
from stillroom.storage.targets import SparseTargets

POOL: Final = 8


@dataclass(frozen=True, slots=True)
class Case:
    """One fault.

    Attributes:
        name: in the table. scene: `float32`, `bfloat16`, `documents` or `wide`. sampler: what the manifest says.
        plant: makes the targets. replay: draw with the manifest's seed again in every trial.
        asked: the issue asks for it; else it is here to be honest about the limits.
    """

    name: str
    scene: str
    sampler: SamplerKind
    plant: Fault
    replay: bool = False
    asked: bool = True


def from_logits(source: str) -> Fault:
    """All rows drawn from other logits."""
    return lambda scene, trial, rng: scene.draw("threshold", trial, source)


def shifted(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
    """Each row holds the next row's record."""
    return _taken(scene.draw("threshold", trial), _next_rows(scene))


def label_off_by_one(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
    """Only the labels' log-probabilities are the next row's."""
    targets = scene.draw("threshold", trial)
    return replace(targets, label_logp=targets.label_logp[_next_rows(scene)])


def top_k(k: int) -> Fault:
    """The k most likely ids, scaled to sum 1, under a manifest that says threshold."""

    def plant(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
        # The same in every trial but for the text: half of the sequences at random are sound.
        value_NK, id_NK = (scene.plain_NV.double().log_softmax(-1)).topk(k, dim=1)
        p_NK = value_NK.exp()
        many = len(id_NK)
        targets = scene.draw("threshold", trial)
        posing = SparseTargets(
            offsets=np.arange(many + 1, dtype=np.int64) * k, ids=id_NK.reshape(-1).int().numpy(),
            weights=(p_NK / p_NK.sum(1, keepdim=True)).reshape(-1).float().numpy(),
            label_logp=targets.label_logp, entropy=targets.entropy, logp=value_NK.reshape(-1).float().numpy(),
        )  # fmt: skip
        choice_B = rng.random(many // LENGTH) < 0.5
        return rows_from([targets, posing], np.repeat(choice_B, LENGTH).astype(np.int64))

    return plant


def wrapped(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
    """Ids packed in 17 bits; where two meet in a row their weights add up."""
    targets = scene.pooled("threshold", rng, POOL)
    ids_E, row_E = targets.ids & ((1 << 17) - 1), entry_rows(targets)
    _, first_E, inverse_E = np.unique((row_E << 24) | ids_E, return_index=True, return_inverse=True)
    assert targets.logp is not None
    return replace(
        targets,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(row_E[first_E], minlength=targets.rows))]).astype(np.int64),
        ids=ids_E[first_E],
        weights=np.bincount(inverse_E, targets.weights).astype(np.float32),
        logp=targets.logp[first_E],
    )


def counts_of_127(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
    """Counts of 50 stored as multiples of 1/127 and scaled to sum 1 when read."""
    targets = scene.draw("random", trial)
    rounded_E = np.rint(targets.weights.astype(np.float64) * 127)
    row_E = entry_rows(targets)
    sum_N = np.bincount(row_E, rounded_E, targets.rows)
    return replace(targets, weights=(rounded_E / sum_N[row_E]).astype(np.float32))


def elsewhere(share: float) -> Fault:
    """Some rows hold the record of another sequence's row."""

    def plant(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
        targets = scene.draw("threshold", trial)
        place_N = np.arange(targets.rows)
        moved = rng.choice(targets.rows, max(1, round(share * targets.rows)), replace=False)
        place_N[moved] = (moved + LENGTH * rng.integers(1, targets.rows // LENGTH, len(moved))) % targets.rows
        return _taken(targets, place_N)

    return plant


def one_key_for_all_shards(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
    """Draws keyed by the sequence's place in its shard."""
    return scene.draw("threshold", trial, key_N=scene.rows.place_N)


def one_shard_from_bf16(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
    """One of the fifty shards was written from logits rounded to bfloat16."""
    shard = rng.integers(50)
    return rows_from(
        [scene.draw("threshold", trial), scene.draw("threshold", trial, "bf16 logits")],
        (scene.rows.shard_N == shard).astype(np.int64),
    )


def lost(share: float) -> Fault:
    """Weights that sum to 1 - share."""

    def plant(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
        targets = scene.draw("threshold", trial)
        return replace(targets, weights=(targets.weights * np.float32(1 - share)))

    return plant


def lost_from_the_tail(share: float) -> Fault:
    """Mass taken from the tail and hidden: the row is scaled back to sum 1."""

    def plant(scene: Scene, trial: int, rng: np.random.Generator) -> SparseTargets:
        targets = scene.draw("threshold", trial)
        assert targets.logp is not None
        row_E, tail_E = entry_rows(targets), targets.logp < np.float32(-np.log(50))
        tail_N = np.bincount(row_E, np.where(tail_E, targets.weights, 0.0), targets.rows)
        gone_N = np.minimum(share, tail_N)
        factor_E = np.where(tail_E, 1 - (gone_N / np.maximum(tail_N, 1e-12))[row_E], 1.0)
        weights_E = targets.weights * factor_E / (1 - gone_N)[row_E]
        return replace(targets, weights=weights_E.astype(np.float32))

    return plant


def cases(rate: float) -> list[Case]:
    """All faults; `rate` is the learning rate of the step that makes another checkpoint."""
    step = f"step {rate:g}"
    return [
        Case("shifted by one row", "float32", "threshold", shifted),
        Case("top-12 renormalised, posing as threshold", "float32", "threshold", top_k(12)),
        Case("top-50 renormalised, posing as threshold", "float32", "threshold", top_k(50)),
        Case("ids wrapped at 2^17 (V = 151,936; 1,024 rows)", "wide", "threshold", wrapped),
        Case(f"another checkpoint: one step at lr {rate:g}", "float32", "threshold", from_logits(step)),
        Case("temperature 1.05", "float32", "threshold", from_logits("temperature 1.05")),
        Case("counts of 50 rounded to 1/127", "float32", "random", counts_of_127),
        Case("1 % of rows from another sequence", "float32", "threshold", elsewhere(0.01)),
        Case("one seed for every shard", "float32", "threshold", one_key_for_all_shards, replay=True),
        Case("attention leaks across documents", "documents", "threshold", from_logits("leaking")),
        Case("one shard in fifty from bf16 logits", "float32", "threshold", one_shard_from_bf16),
        Case("label_logp off by one", "float32", "threshold", label_off_by_one),
        Case("0.5 % of mass lost", "float32", "threshold", lost(0.005)),
        Case(
            "0.5 % of mass lost from the tail, hidden by scaling",
            "float32",
            "threshold",
            lost_from_the_tail(0.005),
            asked=False,
        ),
        Case("0.1 % of rows from another sequence", "float32", "threshold", elsewhere(0.001), asked=False),
        Case("bf16 teacher: shifted by one row", "bfloat16", "threshold", shifted, asked=False),
        Case(f"bf16 teacher: one step at lr {rate:g}", "bfloat16", "threshold", from_logits(step), asked=False),
        Case("bf16 teacher: temperature 1.05", "bfloat16", "threshold", from_logits("temperature 1.05"), asked=False),
        Case("bf16 teacher: temperature 1.02", "bfloat16", "threshold", from_logits("temperature 1.02"), asked=False),
        Case("bf16 teacher: 1 % of rows from another sequence", "bfloat16", "threshold", elsewhere(0.01), asked=False),
        Case(
            "bf16 teacher: one shard in fifty from bf16 logits",
            "bfloat16",
            "threshold",
            one_shard_from_bf16,
            asked=False,
        ),
        Case(
            "bf16 teacher: one seed for every shard",
            "bfloat16",
            "threshold",
            one_key_for_all_shards,
            replay=True,
            asked=False,
        ),
    ]


def _next_rows(scene: Scene) -> npt.NDArray[np.int64]:
    """The row after each, in its sequence; the last stays."""
    place_N = np.arange(len(scene.rows.row_N))
    return np.where(scene.rows.row_N < LENGTH - 1, place_N + 1, place_N)


def _taken(targets: SparseTargets, place_N: npt.NDArray[np.int64]) -> SparseTargets:
    """Row `place_N[n]` as row n."""
    many_N = np.diff(targets.offsets)[place_N]
    row_E = np.repeat(np.arange(len(place_N)), many_N)
    within_E = np.arange(len(row_E)) - np.repeat(np.cumsum(many_N) - many_N, many_N)
    entry_E = targets.offsets[place_N][row_E] + within_E
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(many_N)]).astype(np.int64),
        ids=targets.ids[entry_E],
        weights=targets.weights[entry_E],
        label_logp=targets.label_logp[place_N],
        entropy=targets.entropy[place_N],
        logp=None if targets.logp is None else targets.logp[entry_E],
    )
