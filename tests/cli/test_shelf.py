"""`stillroom verify`, `export` and `import` as they are typed, and the examples of docs/interchange.md as they stand there."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cli import main
from stillroom.storage.cache import open_cache
from stillroom.storage.spec import SamplerSpec

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("shelf_made", ROOT / "tests/storage/made.py")
assert _spec is not None
assert _spec.loader is not None
made: Any = importlib.util.module_from_spec(_spec)
sys.modules["shelf_made"] = made
_spec.loader.exec_module(made)


def run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    made.write(tmp_path / "cache", made.manifest(SamplerSpec(draws=20)))
    return tmp_path / "cache"


def cut(cache: Path) -> None:
    record = json.loads((cache / "commits/000001.json").read_text())
    path = cache / record["path"] / "n/c/0/0"
    path.write_bytes(path.read_bytes()[:-1])


def test_verify(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", cache) == 0
    shown = capsys.readouterr()
    assert "sound" in shown.out
    assert "none (--hashes)" in shown.out
    assert run("verify", "--hashes", cache, "--json") == 0  # a switch does not swallow what follows it
    found = json.loads(capsys.readouterr().out)
    assert found["sound"]
    assert found["hashed_bytes"] > 0
    assert found["rows"] == 96
    assert run("verify", cache, "--sample", "2", "--hashes", "no", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sequences"], found["hashed_bytes"]) == (2, 0)


def test_verify_finds_and_repairs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(cache)
    assert run("verify", cache) == 1
    shown = capsys.readouterr()
    assert "1 finding" in shown.out
    assert "shard 1: size: shards/000001-" in shown.err
    assert "only this shard is redone" in shown.err
    assert run("verify", cache, "--repair", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["dropped"] == [1]
    assert found["findings"][0]["kind"] == "size"
    assert run("verify", cache) == 0
    assert "1 (shards 1): `stillroom cache` makes them" in capsys.readouterr().out


def test_verify_of_what_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", tmp_path) == 2
    assert "holds no manifest.json" in capsys.readouterr().err
    assert run("verify", tmp_path, "--sample", "0") == 2
    assert "--sample came as '0'" in capsys.readouterr().err


def test_export_and_import(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to in ("parquet", "arrow", "datasets"):
        rows, back = tmp_path / to, tmp_path / f"{to}-back"
        assert run("export", cache, "--to", to, "--out", rows) == 0
        assert "per row" in capsys.readouterr().out
        assert run("export", cache, "--to", to, "--out", rows, "--json") == 0
        captured = capsys.readouterr()
        assert "is complete (1 files): nothing to do" in captured.err
        assert json.loads(captured.out)["files_before"] == 1
        assert run("import", rows, "--out", back, "--json") == 0
        assert json.loads(capsys.readouterr().out)["identical"] == 2
        assert run("import", rows, "--out", back) == 0
        assert "nothing to do" in capsys.readouterr().err
        assert run("verify", back, "--hashes") == 0
        capsys.readouterr()


def test_refusals_are_one_sentence(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("export", cache, "--to", "csv", "--out", tmp_path / "x"), "--to came as 'csv'"),
        (("export", cache), "--out is missing"),
        (("export", tmp_path / "nowhere", "--out", tmp_path / "x"), "holds no manifest.json"),
        (("import", tmp_path / "nowhere", "--out", tmp_path / "x"), "holds no stillroom.json"),
    ):
        assert run(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert words in captured.err
        assert "Traceback" not in captured.err
        assert len([line for line in captured.err.splitlines() if line.startswith("stillroom: ")]) == 1
    cut(cache)
    assert run("export", cache, "--out", tmp_path / "x") == 2
    assert "delete commits/000001.json" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_document_does_what_it_says(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    text = (ROOT / "docs/interchange.md").read_text()
    lines = [
        line for line in re.findall(r"^stillroom .*$", text, re.MULTILINE) if "--from" not in line
    ]  # test_import.py
    commands = [line.split("#")[0].split() for line in lines]
    assert [command[1] for command in commands] == ["export", "export", "export", "import"]
    for command in commands:
        assert run(*command[1:]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "again")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/interchange.md", "exec"), {})
    said = capsys.readouterr().out
    assert "after token" in said
    assert "nats at most" in said
    assert "2 of 2 shards are byte for byte" in said


@pytest.mark.parametrize("sampler", ["threshold", "random", "top_k"])
def test_what_the_pipeline_writes_is_sound_and_repair_costs_one_shard(
    sampler: str, teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache"
    command = ["cache", "--teacher", teacher_folder, "--data", text_file, "--out", out, "--seq-len", "16"]
    command += ["--max-sequences", "10", "--sequences-per-shard", "4", "--sampler", sampler]
    assert run(*command) == 0
    assert run("verify", out, "--hashes") == 0
    cut(out)
    # all but the lost shard, and the index, which is made anew from the records
    kept = {
        path: path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and "000001" not in str(path) and path.name != "index.arrow"
    }
    assert run("verify", out, "--repair") == 1
    capsys.readouterr()
    assert run(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out)["shards_before"] == 2
    assert run("verify", out, "--hashes") == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert run("export", out, "--out", tmp_path / "rows") == 0
    capsys.readouterr()
    assert run("import", tmp_path / "rows", "--out", tmp_path / "back", "--json") == 0
    assert json.loads(capsys.readouterr().out)["identical"] == 3
    assert (tmp_path / "back/tokenizer/tokenizer.json").read_bytes() == (out / "tokenizer/tokenizer.json").read_bytes()


def test_export_to_another_profile(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fast"
    assert run("export", cache, "--profile", "fast", "--out", out, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["profile"], said["shards_before"]) == ("fast", 0)
    old, new = open_cache(cache), open_cache(out)
    one, other = old.read(range(len(old))).targets, new.read(range(len(new))).targets
    for field in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
        np.testing.assert_array_equal(getattr(other, field), getattr(one, field))
    assert run("export", cache, "--profile", "fast", "--out", out) == 0
    assert "nothing to do" in capsys.readouterr().err
