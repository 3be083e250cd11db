"""A comparison as a page of Markdown and its figures."""

from __future__ import annotations

import statistics
from typing import Final

from stillroom.comparing.findings import findings
from stillroom.comparing.result import HEADER, ArmResult, Comparison
from stillroom.pipeline.report.bars import bars, stacked
from stillroom.pipeline.report.charts import Level, Series, chart
from stillroom.pipeline.report.scales import Axis

AGAINST_BYTES: Final = {  # figure: key of a run, axis, what is better
    "loss": ("lm_loss", "held-out LM loss, nats per token (lower is better)"),
    "acceptance": ("acceptance", "speculative acceptance (higher is better)"),
}

IN_WORDS: Final = {
    "loss": "LM loss against bytes per row",
    "acceptance": "acceptance against bytes per row",
    "gap": "share of the KL gap closed",
    "bytes": "bytes per row by array",
}


def page(result: Comparison, prefix: str = "") -> str:
    """The page below its heading.

    Args:
        result: what to show.
        prefix: of the figures' file names.
    """
    header = "| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER)
    lines = ["| " + " | ".join(row) + " |" for row in result.rows(every_seed=True)]
    teacher_loss = next((run.get("teacher_lm_loss") for arm in result.arms.values() for run in arm.runs), None)
    seeds = f"Mean over {len(result.seeds)} student seeds, each in brackets. " if len(result.seeds) > 1 else ""
    share = (
        f'"% of gap" is the share of the way from `{result.gap[0]}` to `{result.gap[1]}` of the same seed. '
        if result.gap
        else ""
    )
    intro = (
        (f"Text: {result.text}. " if result.text else "")
        + (f"Teacher: {result.teacher}" if result.teacher else "The teacher")
        + ("" if teacher_loss is None else f" (held-out loss {teacher_loss:.4f})")
        + (f". Student: {result.student}" if result.student else "")
        + f". Every student is trained on the same {result.tokens:,} tokens and measured on {result.held_out_rows:,} held-out "
        f"rows. "
        f"{seeds}{share}Bytes are the whole cache divided by its rows: ids, weights, tokens, lengths, label log-probability, "
        "entropy, and the log-probabilities that are kept."
    )
    found = [f"- {sentence}" for sentence in findings(result)]
    drawings = [f"![{IN_WORDS[name]}]({prefix}{name}.svg)" for name in figures(result)]
    return "\n\n".join([intro, "\n".join([header, *lines]), *(["\n".join(found)] if found else []), *drawings]) + "\n"


def figures(result: Comparison) -> dict[str, str]:
    """SVG by file stem; none where no arm has a cache."""
    shelved = {name: arm for name, arm in result.arms.items() if arm.bytes_per_row is not None}
    drawings: dict[str, str] = {}
    if shelved:
        for name, (key, label) in AGAINST_BYTES.items():
            drawings[name] = _against_bytes(result, shelved, name, key, label)
    shares = {name: result.cells(name, "kl_gap") for name in result.arms if result.cells(name, "kl_gap")}
    if result.gap is not None and shares:
        drawings["gap"] = bars(
            "Share of the KL gap closed",
            f"Bars, one an arm: how much of the way from {result.gap[0]} to {result.gap[1]} its students went in held-out KL.",
            Axis(f"% of the way from {result.gap[0]} to {result.gap[1]}, mean of seeds and their range"),
            {name: 100 * statistics.mean(values) for name, values in shares.items()},
            intervals={name: (100 * min(values), 100 * max(values)) for name, values in shares.items()},
            form=".0f",
        )
    if shelved and all(arm.bytes_by_array for arm in shelved.values()):
        drawings["bytes"] = stacked(
            "Bytes per row by array",
            "Stacked bars, one an arm: the bytes a row takes on disk, by the array they are in.",
            Axis("bytes per row"),
            {name: arm.bytes_by_array for name, arm in shelved.items()},
        )
    return drawings


def _against_bytes(result: Comparison, shelved: dict[str, ArmResult], name: str, key: str, label: str) -> str:
    series = []
    for arm_name, arm in shelved.items():
        values = arm.values(key)
        assert arm.bytes_per_row is not None
        series.append(Series(arm_name, [arm.bytes_per_row], [statistics.mean(values)], [min(values)], [max(values)]))
    levels = [
        Level(arm_name, statistics.mean(arm.values(key)), dashed=arm.loss == "ce")
        for arm_name, arm in result.arms.items()
        if arm.bytes_per_row is None
    ]
    return chart(
        IN_WORDS[name][0].upper() + IN_WORDS[name][1:],
        f"Points, one an arm: {label} against the bytes a row of its cache takes; arms without a cache are lines.",
        Axis("bytes per row of the cache, everything included (logarithmic)", log=True),
        Axis(label),
        series,
        levels=levels,
    )
