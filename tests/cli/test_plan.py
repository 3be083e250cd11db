"""`stillroom plan` at the keyboard: numbers given cost nothing, --json has the documented keys, bad input is one sentence."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.cli import main
from stillroom.pipeline.plan import Plan

NUMBERS = ("--tokens", "3600000000", "--rows-per-s", "10000", "--bytes-per-row", "25")


def run(*arguments: Any) -> int:
    return main(["plan", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, words: list[str]) -> None:
    """Status 2, one line on standard error that holds `words`, nothing on standard output."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("stillroom: ")]
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    for word in words:
        assert word in lines[0], lines[0]


def test_numbers_given_are_reckoned_with(capsys: pytest.CaptureFixture[str]) -> None:
    prices = ("--gpu-hour-price", 2.5, "--gb-month-price", 0.02, "--workers", 8)
    assert run(*NUMBERS, *prices, "--entries-per-row-measured", 12.5, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) == {item.name for item in dataclasses.fields(Plan)}
    assert set(plan["size_bytes"]) == {"value", "low", "high", "source"}
    wanted = {
        "rows": 3.6e9, "size_bytes": 90e9, "worker_hours": 100.0, "wall_hours": 12.5, "compute_price": 250.0,
        "price_per_month": 1.8, "entries_per_row": 12.5,
    }  # fmt: skip
    for name, value in wanted.items():
        assert plan[name]["value"] == pytest.approx(value), name
        assert plan[name]["source"] == "given"
    assert (plan["noise"], plan["top_k"], plan["measured"]) == ([], None, None)


def test_numbers_given_load_nothing() -> None:
    code = (
        f"import sys; from stillroom.cli import main\nassert main(['plan', *{NUMBERS!r}]) == 0\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables(teacher_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = ("--teacher", teacher_folder, "--data", text_file, "--seq-len", 16, "--measure-sequences", 4)
    assert run(*measured, "--workers", 2, "--gpu-hour-price", 1) == 0
    captured = capsys.readouterr()
    for words in (
        "threshold, N = 50",
        "wall hours, 2 workers",
        "price of the run",
        "id_lo",
        "top-k at equal bytes",
        "lost mass",
    ):
        assert words in captured.out, words
    assert "this machine's" in captured.err


def test_bad_input(teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = ("--teacher", teacher_folder, "--data", text_file)
    refused(capsys, words=["--teacher is missing", "--tokens"])
    refused(capsys, "--teacher", teacher_folder, words=["--data is missing"])
    refused(capsys, *NUMBERS[2:], words=["--tokens is missing"])
    refused(capsys, *NUMBERS, "--entries-per-row", 5, words=["--entries-per-row", "nothing to measure"])
    refused(capsys, *NUMBERS, "--workers", 0, words=["--workers came as"])
    refused(capsys, *NUMBERS, "--gpu-hour-price", -1, words=["--gpu-hour-price"])
    refused(capsys, *NUMBERS, "--exponent", 0.5, words=["exponent", "random"])
    refused(capsys, *corpus, "--draws", 9, "--entries-per-row", 5, words=["draws and entries_per_row both came"])
    refused(capsys, *corpus, "--seq-len", 64, "--max-sequences", 1, words=["one sequence", "at least 2"])
    refused(capsys, *corpus, "--seq-len", 16, "--entries-per-row", 0.5, words=["at least 1", "ask for more"])
    refused(capsys, *corpus, "--seq-len", 16, "--entries-per-row", 301, words=["4096 draws", "ask for fewer"])
    refused(
        capsys, "--teacher", tmp_path, "--data", text_file, words=["no tokenizer can be loaded", "save the teacher's"]
    )
