"""What every benchmark shares: name the machine, take medians, keep JSON and a dated page."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGES = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def machine() -> dict[str, Any]:
    """Processor, cores, accelerator, Python and library versions of this run."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "zarr", "numcodecs", "numpy", "pyarrow")
        },
    }


def interleaved(
    variants: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each variant, run in turn A B C A B C ... after one warm-up each, so drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, function in variants.items():
            start = clock()
            function()
            if repeat:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, title: str, command: str, figures: dict[str, Any], body: str) -> None:
    """Write `docs/benchmarks/NAME.json` and the page made from it, and print the page.

    Args:
        name: file stem; a run on a GPU takes a stem of its own, so that it stands beside the CPU's.
        title: heading of the page.
        command: what to type to get these numbers again.
        figures: everything measured, JSON-able.
        body: Markdown below the heading: what was measured, tables, what they show, what fell short.
    """
    PAGES.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    record = {"benchmark": name, "date": date, "command": command, "machine": machine(), "figures": figures}
    (PAGES / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    render(name, title, body)


def figures_of(name: str) -> dict[str, Any]:
    """The figures of a kept result."""
    figures: dict[str, Any] = json.loads((PAGES / f"{name}.json").read_text())["figures"]
    return figures


def render(name: str, title: str, body: str) -> None:
    """Write the page of a kept result: its own date, machine and command above `body`."""
    record = json.loads((PAGES / f"{name}.json").read_text())
    where = record["machine"]
    versions = ", ".join(f"{library} {number}" for library, number in where["versions"].items())
    page = (
        f"# {title}\n\n{record['date']} · {where['cpu']}, {where['cores']} cores, {where['gpu'] or 'no GPU'} · "
        f"Python {where['python']}, {versions}\n\n"
        f"`{record['command']}` makes this page and [{name}.json]({name}.json).\n\n{body.strip()}\n"
    )
    (PAGES / f"{name}.md").write_text(page)
    print(page)
