"""What a person sees while a command runs: bars on a terminal, a line every few seconds elsewhere, tables at the end.

Everything but results goes to standard error, so that `--json` leaves standard output to machines.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

LINE_EVERY_S: Final = 5.0
err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def say(text: str) -> None:
    """One line on standard error, never wrapped, never read as markup."""
    err.print(text, soft_wrap=True, markup=False)


class Reporter:
    """Progress of named stages: call it with (stage, done, total, note); total 0 means unknown."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=err,
        ) if err.is_terminal else None  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> Reporter:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps of `stage` are finished."""
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=None, note="")
            self._bars.update(self._tasks[stage], completed=done, total=total or None, note=note)
            return
        now = time.monotonic()
        start_s, first = self._started.setdefault(stage, (now, done))
        if now - self._last.get(stage, 0.0) < LINE_EVERY_S and (done < total or not total):
            return
        self._last[stage] = now
        rate = (done - first) / (now - start_s) if now > start_s else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate and total else ""
        count = f"{done}/{total}" if total else str(done)
        say(f"{stage}: {count} ({rate:.1f}/s{left}) {note}".rstrip())

    def close(self, stage: str) -> None:
        """Forget a stage that is over: its bar goes, and one of the same name begins anew."""
        if stage in self._tasks and self._bars:
            self._bars.remove_task(self._tasks.pop(stage))
        self._started.pop(stage, None)
        self._last.pop(stage, None)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output: first column left, the rest right."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        grid.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        grid.add_row(*[str(cell) for cell in row])
    # Outside a terminal nothing tells the width: let the table be as wide as it is.
    (out if out.is_terminal else Console(file=sys.stdout, width=160, highlight=False)).print(grid)


def show_pairs(title: str, pairs: Sequence[tuple[str, Any]]) -> None:
    """Print a two-column table of names and values."""
    show_table(title, ("", ""), pairs)
