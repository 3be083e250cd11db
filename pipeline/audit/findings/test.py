"""`Test`: one named test of the audit, and what its finding means to a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stillroom.pipeline.audit.nulls import FALSE_ALARM, holm


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One test.

    Attributes:
        name: `family.detail`; tests of one shard carry it in brackets.
        statistic: the number tested; `what` says what it is.
        p: chance that a sound cache has a statistic as extreme, exact or an upper bound.
        says: the finding in a sentence, with its numbers.
        consequence, remedy: for a person.
        figures: numbers behind it.
    """

    __test__ = False  # for pytest, which collects by name

    name: str
    what: str
    statistic: float
    p: float
    says: str
    consequence: str
    remedy: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A test with its threshold.

    Attributes:
        threshold: p at or below it is a finding (Holm over all tests of the audit).
        found: whether it is.
    """

    test: Test
    threshold: float
    found: bool


# What a person should read first: a cause before its symptoms. Likelihood ratios stand together, the largest first.
_CAUSES: Final = ("record.damaged", "sequences", "tokenizer", "record.sums", "record.counts", "posing", "seed")
_RATIOS: Final = ("alignment.targets", "attention", "ids", "temperature", "rows")
_SYMPTOMS: Final = ("alignment", "record", "drift", "temperature", "bias", "shard", "writer")
_FEW: Final = 4  # where at most one shard in so many has a finding, it is the shards'


def judge(tests: Sequence[Test], level: float = FALSE_ALARM) -> list[Judged]:
    """All tests, findings first, causes before symptoms; false alarms of a sound cache stay below `level` in all."""
    judged = [
        Judged(test=test, threshold=threshold, found=test.p <= threshold)
        for test, threshold in zip(tests, holm([test.p for test in tests], level))
    ]
    shards = {
        name: found for name, found in ((each.test.name, each.found) for each in judged) if name.startswith("shard.")
    }
    bad = {name.split("[")[1] for name, found in shards.items() if found}
    local = 0 < _FEW * len(bad) <= len({name.split("[")[1] for name in shards})
    return sorted(judged, key=lambda each: (not each.found, *_place(each.test, local), each.test.p))


def _place(test: Test, local: bool) -> tuple[float, float]:
    """Where a finding stands; `local`: few shards have one."""
    if _is(test, _CAUSES):
        return 0, 0
    if _is(test, _RATIOS) and test.figures.get("cause", True):
        return 1, -test.statistic
    if local and test.name.startswith("shard."):
        return 2, 0
    return 3, next(place for place, family in enumerate((*_SYMPTOMS, "")) if test.name.startswith(family))


def _is(test: Test, families: Sequence[str]) -> bool:
    return any(test.name.startswith(family) for family in families)


def certain(broken: int) -> float:
    """p of a rule that no sound cache breaks even once."""
    return 0.0 if broken else 1.0
