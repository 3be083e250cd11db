"""Shards against one another without a teacher: how much surer the text was to the teacher than it said.

The surprise of a label less the row's entropy averages to the miscalibration of the teacher on the text, whatever the text.
Text moves it a little, another teacher or tokenizer in a shard by nats: a shard is told apart beyond `ALLOWANCE_NATS`.

Shapes: `S` sequences.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from stillroom.pipeline.audit.findings.test import Test
from stillroom.storage.cache import Cache
from stillroom.storage.errors import DamagedError
from stillroom.storage.rows import row_statistics

ALLOWANCE_NATS: Final = 0.5
FEWEST_SEQUENCES: Final = 8
MOST_SEQUENCES: Final = 1 << 20  # of caches whose rows are read for it


def calibration_of_shards(cache: Cache) -> list[Test]:
    """A test of each shard that has enough sequences."""
    if len(cache.shards) < 2 or len(cache) > MOST_SEQUENCES:
        return []
    try:
        rows = row_statistics(cache)
    except DamagedError:  # said so by `sequences`
        return []
    gap_S = -rows.label_logp_S.astype(np.float64) - rows.entropy_S
    has_S = np.isfinite(gap_S)
    spread, tests, start = float(gap_S[has_S].std()) if has_S.any() else 0.0, [], 0
    for shard, length in zip(cache.shards, cache.lengths):
        inside_S = np.zeros(len(gap_S), np.bool_)
        inside_S[start : start + length] = True
        start += length
        own, rest = gap_S[inside_S & has_S], gap_S[~inside_S & has_S]
        if min(len(own), len(rest)) < FEWEST_SEQUENCES:
            continue
        difference = float(own.mean() - rest.mean())
        error = max(spread * math.sqrt(1 / len(own) + 1 / len(rest)), 1e-9)
        z = max(0.0, abs(difference) - ALLOWANCE_NATS) / error
        tests.append(Test(
            name=f"shard.calibration[{shard}]",
            what="mean of surprise less entropy of the shard, less that of the others, nats",
            statistic=difference,
            p=min(1.0, 2 * math.exp(-min(z * z / 2, 700.0))),
            says=f"in shard {shard} labels surprise the teacher {difference:+.2f} nats beyond its entropies, against the rest",
            consequence="the shard may come from another teacher, tokenizer or text than the rest",
            remedy=f"audit it with the teacher; if its text is not of another kind, make shard {shard} again",
            figures={"standard_error": error, "sequences": len(own)},
        ))  # fmt: skip
    return tests
