"""docs/train.md: the loop runs as printed, gives the Trainer's losses, and the page names every setting of the engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom.train.config import TrainConfig
from stillroom.train.run import train_student

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "train.md").read_text()
ENGINE = (
    "ema", "lora_rank", "lora_alpha", "lora_targets", "head", "gradient_checkpointing", "compile", "parallel",
    "loader_workers", "report_to", "clip", "optimizer", "grad_accumulation", "save_every", "log_every",
)  # fmt: skip


def test_the_loop_as_printed_gives_the_trainers_losses(
    settings: Callable[..., TrainConfig], cache: Path, save_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r"<!-- own loop -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    assert found[1].count("\n") <= 40
    save_model(tmp_path / "student", seed=3)
    (tmp_path / "cache").symlink_to(cache)
    monkeypatch.chdir(tmp_path)
    code = compile(found[1], "docs/train.md", "exec")
    first: dict[str, Any] = {}
    exec(code, first)
    again: dict[str, Any] = {}
    exec(code, again)  # finds its state, and nothing left to do
    assert again["losses"] == []
    config = settings(
        cache=cache, student=str(tmp_path / "student"), steps=20, lr=2e-3, alpha=0.2, schedule="constant", warmup=0
    )
    train_student(config)
    logged = [json.loads(line)["loss"] for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert first["losses"] == pytest.approx(logged, abs=1e-5)


def test_every_setting_of_the_engine_is_on_the_page() -> None:
    for name in ENGINE:
        assert name in TrainConfig.model_fields
        assert f"--{name.replace('_', '-')}" in PAGE, name
