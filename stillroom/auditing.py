"""Body of `stillroom audit`: what a cache is worth before a student is trained on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from stillroom.console import Reporter, say, show_pairs, show_table

if TYPE_CHECKING:
    from stillroom.pipeline.audit.config import AuditConfig
    from stillroom.pipeline.audit.result import AuditResult

SHOWN = 20  # findings in the table; audit.json has them all


class Audited(dict[str, Any]):
    """audit.json with an exit status."""

    exit_status = 0


def audit(config: AuditConfig, as_json: bool) -> Audited:
    """`stillroom audit`."""
    from stillroom.pipeline.audit.run import audit as run_audit

    with Reporter() as report:
        result = run_audit(config, on_progress=report)
    if not as_json:
        _show(config, result)
    answer = Audited(result.to_json())
    answer.exit_status = result.exit_status
    return answer


def _show(config: AuditConfig, result: AuditResult) -> None:
    if result.findings:
        rows = [(each.test.name, f"{each.test.p:.0e}", each.test.says) for each in result.findings[:SHOWN]]
        show_table(f"findings in {result.cache}", ("test", "chance if sound", "what was found"), rows)
        first = result.findings[0].test
        say(f"what it does: {first.consequence}")
        say(f"what to do: {first.remedy}")
    pairs = [
        ("verdict", "sound" if result.sound else f"not sound: {len(result.findings)} findings"),
        ("rows", f"{result.rows:,} ({result.sequences:,} sequences of {result.shards:,} shards)"),
        ("tests", f"{len(result.tests)}, of which a sound cache fails any with chance 0.001"),
        *_figures(result.measures),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    show_pairs(f"audit of {result.cache}", pairs)
    for note in result.notes:
        say(f"note: {note}")
    if config.out is not None:
        say(f"wrote {config.out / 'audit.json'}")


def _figures(measures: dict[str, Any]) -> list[tuple[str, str]]:
    shown = []
    for name, title in (
        ("entries", "entries per row"),
        ("kept_mass", "kept mass"),
        ("squared_error", "squared error per row"),
    ):
        if (figure := measures.get(name)) and figure["mean"] is not None:
            interval = "" if figure["low"] is None else f" ({figure['low']:.4g} to {figure['high']:.4g})"
            shown.append((title, f"{figure['mean']:.4g}{interval}"))
    if "bytes_by_array" in measures:
        shown.append(("bytes per row", f"{sum(measures['bytes_by_array'].values()):.1f}"))
    shown += [
        (f"gradient angle, {line['rows']:,} rows", f"{line['angle']['mean']:.1f} degrees")
        for line in measures.get("gradient", {}).get("batches", [])
        if line["arm"] == "the cache" and math.isfinite(line["angle"]["mean"])
    ]
    return shown
