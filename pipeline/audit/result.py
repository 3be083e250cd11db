"""`AuditResult`: what an audit found, and the audit.json that says so. docs/audit.md has the schema.

The JSON is enough for a report: every figure's numbers are in it, with their intervals, and nothing is rounded for display.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from stillroom.pipeline.audit.findings.test import Judged

FORMAT: Final = "stillroom-audit"
FORMAT_VERSION: Final = 1
NAME: Final = "audit.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """A finished audit.

    Attributes:
        cache: directory or URL. made: who made it, from the manifest. teacher: what it was compared with; None without one.
        rows, sequences, shards: looked at. rows_asked: asked for.
        seed: of the choice.
        tests: all tests, findings first.
        measures: figures by name, see docs/audit.md; empty where they were left out.
        notes: what a reader should know besides.
        seconds: wall time. libraries: versions.
    """

    cache: str
    made: dict[str, Any]
    teacher: dict[str, Any] | None
    rows: int
    rows_asked: int
    sequences: int
    shards: int
    seed: int
    tests: tuple[Judged, ...]
    measures: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    libraries: dict[str, str] = field(default_factory=dict)

    @property
    def findings(self) -> tuple[Judged, ...]:
        """The tests that found something."""
        return tuple(test for test in self.tests if test.found)

    @property
    def sound(self) -> bool:
        """No finding."""
        return not self.findings

    @property
    def verdict(self) -> str:
        """One sentence."""
        against = "its own record" if self.teacher is None else f"teacher {self.teacher['name']}"
        where = f"{self.rows:,} rows of {self.sequences:,} sequences against {against}"
        if self.sound:
            return f"sound: {where}, {len(self.tests)} tests, no finding"
        first = self.findings[0].test
        more = f" (and {len(self.findings) - 1} more findings)" if len(self.findings) > 1 else ""
        return f"NOT SOUND: {first.says}{more}; {where}"

    @property
    def exit_status(self) -> int:
        """0 sound, 1 a finding."""
        return 0 if self.sound else 1

    def to_json(self) -> dict[str, Any]:
        """The plain object."""
        tests = [{**asdict(each.test), "threshold": each.threshold, "found": each.found} for each in self.tests]
        plain = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "sound": self.sound,
            "verdict": self.verdict,
            **{name: getattr(self, name) for name in
               ("cache", "made", "teacher", "rows", "rows_asked", "sequences", "shards", "seed")},
            "findings": [test["name"] for test in tests if test["found"]],
            "tests": tests,
            "measures": self.measures,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "libraries": self.libraries,
        }  # fmt: skip
        result: dict[str, Any] = _plain(plain)
        return result

    def save(self, folder: Path) -> Path:
        """Write audit.json into `folder`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{NAME}.part"
        part.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        return part.replace(folder / NAME)


def _plain(value: Any) -> Any:
    """What JSON knows: no numpy, no NaN (null instead)."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
