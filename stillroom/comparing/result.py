"""The result of a comparison: figures by arm and seed, shares of gaps; as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from stillroom.console import say, show_table

GAPS: Final = {"lm_loss": "LM loss", "kl": "KL to the teacher"}
HEADER: Final = (
    "arm", "kept", "entries/row", "bytes/row", "LM loss", "% of loss gap", "KL to teacher", "% of KL gap", "ECE", "acceptance",
    "top-1 agreement", "tokens/s",
)  # fmt: skip
COLUMNS: Final = (  # of one run, after bytes per row: key, form
    ("lm_loss", ".4f"), ("lm_loss_gap", ".0%"), ("kl", ".4f"), ("kl_gap", ".0%"), ("ece", ".4f"), ("acceptance", ".4f"),
    ("top1_agreement", ".4f"), ("tokens_per_s", ",.0f"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm.

    Attributes:
        kept: what its cache keeps of a row, in words; or where its targets come from else.
        loss: name of the loss.
        draws: of its cache's sampler.
        entries_like: the arm whose entries per row it was to keep.
        entries_per_row, bytes_per_row, bytes_by_array: of its cache, everything included, means over rows.
        runs: figures by seed: those of the evaluation, `seed`, `train_loss`, `tokens_per_s`.
    """

    kept: str = ""
    loss: str = ""
    draws: int | None = None
    entries_like: str | None = None
    entries_per_row: float | None = None
    bytes_per_row: float | None = None
    bytes_by_array: dict[str, float] = field(default_factory=dict)
    runs: tuple[dict[str, Any], ...] = ()

    def values(self, key: str) -> list[float]:
        """A figure of every seed."""
        return [run[key] for run in self.runs]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arms on one ground.

    Attributes:
        tokens: rows every student was trained on in one pass.
        held_out_rows: rows the figures are means over.
        seeds: one student each.
        text, teacher, student: what they are, in words.
        gap: arms at 0 and 100 % of the gap, if the comparison has such.
        arms: by name, in their order.
        seconds_this_run: wall time; what was found finished took none.
    """

    tokens: int
    held_out_rows: int
    seeds: tuple[int, ...]
    arms: dict[str, ArmResult]
    text: str = ""
    teacher: str = ""
    student: str = ""
    gap: tuple[str, str] | None = None
    seconds_this_run: float = 0.0

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_json`; keys it does not know are passed over."""
        known = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        names = {one.name for one in fields(ArmResult)}
        arms = {}
        for name, arm in known["arms"].items():
            own = {key: value for key, value in arm.items() if key in names}
            arms[name] = ArmResult(**{**own, "runs": tuple(arm["runs"])})
        gap = known.get("gap")
        return cls(
            **{**known, "arms": arms, "seeds": tuple(known["seeds"]), "gap": None if gap is None else tuple(gap)}
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON object, shares of gaps in it."""
        data = asdict(self)
        for name, arm in data["arms"].items():
            for place, run in enumerate(arm["runs"]):
                run |= {f"{key}_gap_closed": self.closed(name, key, place) for key in GAPS}
        return data

    def save(self, folder: Path) -> None:
        """Write `comparison.json`, whole or not at all."""
        from stillroom.train.folder import write_json

        write_json(folder / "comparison.json", self.to_json())

    def write_page(self, folder: Path) -> None:
        """Write `comparison.md` and its figures."""
        from stillroom.comparing.page import figures, page

        for name, drawing in figures(self).items():
            (folder / f"{name}.svg").write_text(drawing, encoding="utf-8")
        (folder / "comparison.md").write_text(f"# Targets compared\n\n{page(self)}", encoding="utf-8")

    def closed(self, arm: str, key: str, place: int) -> float | None:
        """Share of the gap between the two ends that the arm's run at `place` of the seeds closed; None: there is no gap yet."""
        ends = [self.arms.get(name, ArmResult()) for name in self.gap or ()]
        if len(ends) < 2 or min(len(end.runs) for end in ends) <= place:
            return None
        low, high = (float(end.runs[place][key]) for end in ends)
        # + 0.0: no minus zero
        return None if low == high else (low - float(self.arms[arm].runs[place][key])) / (low - high) + 0.0

    def gap_and_spread(self, key: str) -> tuple[float, float] | None:
        """Mean distance between the two ends, and the largest distance between seeds of one end; None: no ends, one seed."""
        if self.gap is None or len(self.seeds) < 2:
            return None
        ends = [self.arms[name].values(key) for name in self.gap]
        return abs(statistics.mean(ends[0]) - statistics.mean(ends[1])), max(max(end) - min(end) for end in ends)

    def resolved(self, key: str) -> bool:
        """Whether the gap is at least twice as wide as the seeds are apart, as far as more than one seed can tell."""
        found = self.gap_and_spread(key)
        return found is None or found[0] > 2 * found[1]

    def cells(self, name: str, key: str) -> list[float]:
        """A column of an arm by seed; empty where it has none, or a share of a gap that is not resolved."""
        if not key.endswith("_gap"):
            return [value for value in self.arms[name].values(key) if value is not None]
        what = key.removesuffix("_gap")
        found = [self.closed(name, what, place) for place in range(len(self.arms[name].runs))]
        return [share for share in found if share is not None] if self.resolved(what) else []

    def rows(self, *, every_seed: bool) -> list[list[str]]:
        """The table: one row an arm; means, and with `every_seed` each seed's figure in brackets."""
        table = []
        for name, arm in self.arms.items():
            kept = arm.kept if arm.loss in ("forward_kl", "ce") else f"{arm.kept}; {arm.loss}"
            sizes = ["" if size is None else f"{size:.{digits}f}"
                     for size, digits in ((arm.entries_per_row, 2), (arm.bytes_per_row, 1))]  # fmt: skip
            cells = [_cell(self.cells(name, key), form, every_seed) for key, form in COLUMNS]
            table.append([name, kept, *sizes, *cells])
        return table

    def show(self) -> None:
        """Print the table of means, and what it shows."""
        from stillroom.comparing.findings import findings

        show_table(
            f"{self.held_out_rows:,} held-out rows, mean of {len(self.seeds)} seeds",
            HEADER,
            self.rows(every_seed=False),
        )
        for sentence in findings(self):
            say(sentence)


def _cell(values: Sequence[float], form: str, every_seed: bool) -> str:
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return f"{mean} ({', '.join(format(value, form) for value in values)})" if every_seed and len(values) > 1 else mean
