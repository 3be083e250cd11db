"""Are draws of different rows independent: do the tails of the cache match draws made with a key they should not have.

With the teacher at hand a draw can be made again, keyed wrongly on purpose. A sound cache matches it no more often than it
matches fresh draws of the same rows (`nulls.conditional`).

Shapes: `R` rows.
"""

from __future__ import annotations

from stillroom.pipeline.audit.draws import DRAWS
from stillroom.pipeline.audit.facts import Facts
from stillroom.pipeline.audit.findings.test import Test
from stillroom.pipeline.audit.nulls import conditional
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import Manifest


def reproduced(facts: Facts) -> float | None:
    """Share of rows with a tail whose draw the manifest's seed makes again; None where nothing was drawn again."""
    asked_R = facts.replayed_R & (facts.tail_R > 0)
    return float(facts.same_own_R[asked_R].mean()) if asked_R.any() else None


def seeds(manifest: Manifest, facts: Facts) -> list[Test]:
    """Tests of two keys that hasty writers use."""
    if manifest.sampler.kind in TOP_KINDS:
        return []
    place_R = facts.sequence_R % manifest.sequences_per_shard
    tests = []
    for key, same_R, other_R, what in (
        ("shard", facts.same_shard_R, place_R != facts.sequence_R, "the same random numbers serve every shard"),
        ("zero", facts.same_zero_R, facts.sequence_R != 0, "the same random numbers serve every sequence"),
    ):
        asked_R = facts.replayed_R & other_R & (facts.tail_R > 0)
        if not asked_R.any():
            continue
        same, chance = int(same_R[asked_R].sum()), int(facts.drawn_common_R[asked_R].sum())
        tests.append(
            Test(
                name=f"seed.{key}",
                what=f"rows whose tail was drawn with the key of {'another shard' if key == 'shard' else 'sequence 0'}",
                statistic=same,
                p=conditional(same, chance, DRAWS),
                says=f"{what}: {same:,} of {int(asked_R.sum()):,} tails match, {chance / DRAWS:,.0f} would by chance",
                consequence="noise of the sample no longer averages out over rows: the student learns it",
                remedy="key the generator by seed, sequence and row (`stillroom cache` does), and make the cache again",
                figures={"rows": int(asked_R.sum()), "same": same, "by_chance": chance / DRAWS},
            )
        )
    return tests
