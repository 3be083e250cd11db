"""Are the weights right on average: kept weight against true mass, by probability, by rank, by range of ids.

Draws of different rows are independent given the teacher, and their variance is that of fresh draws of the very same rows,
coded alike (`draws`): Bernstein's bound needs no more. The control run's own difference is added as a variance of whole
sequences, since noise of the arithmetic is shared within one.

Shapes: `R` rows, `G` buckets, `S` sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from stillroom.pipeline.audit.buckets import partition
from stillroom.pipeline.audit.draws import DRAWS
from stillroom.pipeline.audit.facts import Facts
from stillroom.pipeline.audit.findings.drift import ALLOWANCE
from stillroom.pipeline.audit.findings.test import Test
from stillroom.pipeline.audit.nulls import bernstein, conditional
from stillroom.storage.layout import TOP_KINDS
from stillroom.storage.manifest import Manifest

FEW_HITS: Final = 50
ROUNDING: Final = 2e-7  # of a row's sum of float32 weights
_Z95: Final = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class BucketBias:
    """One bucket.

    Attributes:
        kind, name: `probability`, `rank` or `id`, and which.
        mass: mean true mass of a row.
        bias: mean of kept weight less true mass; `low`, `high` its 95 % interval.
        z: in standard errors.
        entries: kept entries in it, all rows together.
        p: chance that a sound cache is as far off; 1 where the sampler is biased by design.
    """

    kind: str
    name: str
    mass: float
    bias: float
    low: float
    high: float
    z: float
    entries: int
    p: float


def buckets(manifest: Manifest, facts: Facts) -> list[BucketBias]:
    """Bias of every bucket that holds anything."""
    parts = partition(manifest.vocab_size)
    excess_RG = facts.weight_RG() - facts.mass_RG
    designed = manifest.sampler.kind in TOP_KINDS
    # The cached draw is one more like the fresh ones: with it no bucket's variance is underrated for want of draws.
    if designed:
        variance_G = ((excess_RG - excess_RG.mean(0)) ** 2).sum(0)
    else:
        variance_G = ((DRAWS * facts.drawn_variance_RG + excess_RG**2) / (DRAWS + 1)).sum(0)
        # Where hardly a draw falls its variance can not be seen: a hit weighs at most 2 / N, so it is at most 2 p / N.
        mass_G, quantum = facts.mass_RG.sum(0), 2 / manifest.sampler.draws
        rare_G = mass_G * manifest.sampler.draws < FEW_HITS
        variance_G = np.where(rare_G, np.maximum(variance_G, mass_G * quantum), variance_G)
    _, sequence_R = np.unique(facts.sequence_R, return_inverse=True)
    noise_SG = np.zeros((int(sequence_R.max(initial=0)) + 1, excess_RG.shape[1]))
    np.add.at(noise_SG, sequence_R, facts.control_RG)
    variance_G += ALLOWANCE**2 * (noise_SG**2).sum(0)
    largest_G = np.maximum(
        2 * np.maximum(facts.drawn_largest_RG, np.abs(excess_RG)).max(0, initial=0.0), 2 / manifest.sampler.draws
    )
    entries_G = np.bincount(facts.bucket_E3.ravel(), minlength=excess_RG.shape[1])
    result = []
    for index, (name, kind) in enumerate(zip(parts.names, parts.kinds)):
        mass, total = float(facts.mass_RG[:, index].mean()), float(excess_RG[:, index].sum())
        if mass < 1e-12 and not entries_G[index]:
            continue
        error = math.sqrt(variance_G[index]) / facts.rows
        mean = total / facts.rows
        beyond = max(0.0, abs(total) - ROUNDING * facts.rows)
        result.append(BucketBias(
            kind=kind, name=name, mass=mass, bias=mean, low=mean - _Z95 * error, high=mean + _Z95 * error,
            z=mean / error if error > 0 else 0.0, entries=int(entries_G[index]),
            p=1.0 if designed else bernstein(beyond, float(variance_G[index]), float(largest_G[index])),
        ))  # fmt: skip
    return result


def bias(manifest: Manifest, facts: Facts) -> list[Test]:
    """Tests of every bucket, and whether the most likely ids pose as a sample; none where the sampler is biased by design."""
    if manifest.sampler.kind in TOP_KINDS:
        return []
    tests = [
        Test(
            name=f"bias.{each.kind}[{each.name}]",
            what="mean of kept weight less the teacher's mass, a row",
            statistic=each.bias,
            p=each.p,
            says=f"{each.kind} {each.name}: kept weight is off by {each.bias:+.2g} a row ({each.z:+.1f} standard errors; the "
            f"teacher has {each.mass:.3g} there)",
            consequence="the student is pulled to another distribution than the teacher's, and more rows do not cure it",
            remedy="draw by a sampler that is unbiased (threshold, random, systematic), and keep its weights as they come",
            figures={"mass": each.mass, "bias": each.bias, "low": each.low, "high": each.high, "z": each.z},
        )
        for each in buckets(manifest, facts)
    ]
    top, fresh = int(facts.top_R.sum()), int(facts.drawn_top_R.sum())
    tests.append(
        Test(
            name="posing.top_k",
            what="rows that keep just their most likely ids",
            statistic=top,
            p=conditional(top, fresh, DRAWS),
            says=f"{top:,} of {facts.rows:,} rows keep just their most likely ids, {fresh / DRAWS:,.0f} would by chance: "
            f"this is top-k, not {manifest.sampler.kind}",
            consequence="the tail is never taught and the head too sharply: top-k is biased whatever is done with the rest",
            remedy="name it top_k in the manifest, so that losses treat its missing mass, or draw a sample",
            figures={"rows": top, "by_chance": fresh / DRAWS},
        )
    )
    return tests
