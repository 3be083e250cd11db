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


# What a person should read first: a specific cause before its symptoms.
_FIRST: Final = ("sequences", "record", "tokenizer", "alignment", "attention", "ids", "temperature", "posing", "seed", "rows",
                 "drift", "bias", "shard", "writer")  # fmt: skip


def judge(tests: Sequence[Test], level: float = FALSE_ALARM) -> list[Judged]:
    """All tests, findings first, specific causes before symptoms; false alarms of a sound cache stay below `level` in all."""
    judged = [
        Judged(test=test, threshold=threshold, found=test.p <= threshold)
        for test, threshold in zip(tests, holm([test.p for test in tests], level))
    ]
    return sorted(judged, key=lambda each: (not each.found, _rank(each.test.name), each.test.p))


def _rank(name: str) -> int:
    family = name.split(".")[0]
    return _FIRST.index(family) if family in _FIRST else len(_FIRST)


def certain(broken: int) -> float:
    """p of a rule that no sound cache breaks even once."""
    return 0.0 if broken else 1.0
