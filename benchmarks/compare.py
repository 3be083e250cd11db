"""The paper's experiment in small: one teacher, one student, one text; only the kind of target differs.

`python -m benchmarks.compare [--out DIR] [any option of stillroom compare]` runs the built-in recipe `compare`, going on where
it stopped, and keeps docs/benchmarks/compare.{json,md} and its figures. `--render` makes page and figures again from the JSON.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks import report
from stillroom.comparing.config import CompareConfig
from stillroom.comparing.page import figures, page
from stillroom.comparing.result import Comparison
from stillroom.comparing.run import run_comparison
from stillroom.console import Reporter
from stillroom.recipes import recipes
from stillroom.settings import parse

NAME = "compare"
TITLE = "Targets compared: same teacher, same student, same text"


def run(arguments: list[str]) -> Comparison:
    """The comparison of the recipe, `arguments` over it."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(recipes()[NAME].text)
        file.flush()
        config, _ = parse(
            CompareConfig, ["--config", file.name, *arguments], prog="benchmarks.compare", summary="", examples=""
        )
    with Reporter() as progress:
        return run_comparison(config, progress)


def draw(result: Comparison, folder: Path) -> None:
    """The figures of the page."""
    for name, drawing in figures(result).items():
        (folder / f"{NAME}-{name}.svg").write_text(drawing, encoding="utf-8")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["--render"]:
        result = Comparison.from_json(report.figures_of(NAME))
        report.render(NAME, TITLE, page(result, prefix=f"{NAME}-"))
    else:
        result = run(arguments)
        report.save(NAME, TITLE, "make compare", result.to_json(), page(result, prefix=f"{NAME}-"))
    draw(result, report.PAGES)


if __name__ == "__main__":
    main()
