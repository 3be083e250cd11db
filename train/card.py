"""The model card of a student: `README.md` with the front matter the hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(
    *, title: str, settings: Mapping[str, Any], origin: Mapping[str, str], numbers: Mapping[str, Any]
) -> str:
    """The card's text.

    Args:
        title: name of the student.
        settings: resolved settings of the run.
        origin: label to text: teacher, cache, corpus, sampler.
        numbers: final figures.
    """
    told = "\n".join(f"- {label}: {text}" for label, text in origin.items())
    table = "\n".join(
        f"| {name} | {_shown(value)} |" for name, value in {**settings, **numbers}.items() if value is not None
    )
    tags = "\n".join(
        f"- {tag}" for tag in ("stillroom", "distillation") if tag == "stillroom" or settings["loss"] != "ce"
    )
    return f"""---
library_name: transformers
tags:
{tags}
---

# {title}

A student trained with Stillroom, loss `{settings["loss"]}`.

{told}

| | |
|---|---|
{table}
"""


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
