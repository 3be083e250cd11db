"""`stillroom audit` through the door: a sound cache passes, another teacher is found, bad input is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.cli import main
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.run import build_cache


@pytest.fixture(scope="module")
def made(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "c"
    build_cache(
        CacheConfig(
            teacher=str(teacher_folder), data=str(text_file), out=out, seq_len=32, sequences_per_shard=8, batch_size=4,
            dtype="float32", draws=12,
        )
    )  # fmt: skip
    return out


def audit(*words: Any) -> int:
    return main(["audit", *map(str, words), "--rows", "512"])


def test_a_sound_cache_passes(made: Path, teacher_folder: Path, tmp_path: Path) -> None:
    assert audit(made, "--teacher", teacher_folder, "--out", tmp_path / "report") == 0
    told = json.loads((tmp_path / "report" / "audit.json").read_text())
    assert told["findings"] == []
    assert len(told["tests"]) > 10
    assert audit(made, "--no-teacher") == 0


def test_another_teacher_is_found(
    made: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "other")
    assert audit(made, "--teacher", tmp_path / "other") == 1
    assert "not sound" in capsys.readouterr().out


def test_what_can_not_be_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(tmp_path / "nowhere", "--no-teacher") == 2
    assert "Traceback" not in capsys.readouterr().err
