"""One process, ranks, local workers, torchrun, Ray: the same bytes; SIGTERM and refusals."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from stillroom.cli import main
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.run import build_cache
from stillroom.storage.cache import open_cache
from stillroom.storage.index import read_index
from stillroom.storage.verify import verify
from tests.conftest import llama_config, make_text, make_tokenizer


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


runs = _load("engine_runs")


def settings(teacher: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    common = dict(
        teacher=str(teacher),
        data=str(text),
        out=out,
        seq_len=32,
        sequences_per_shard=2,
        batch_size=4,
        max_sequences=47,
        dtype="float32",
    )
    return {**common, **changes}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two of them wait for each other most of the time where others work too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the cache one process makes."""
    out = tmp_path_factory.mktemp("alone") / "c"
    build_cache(CacheConfig(**settings(teacher_folder, text_file, out)))
    found = runs.digests(out)
    assert len(found) > 100
    return dict(found)


def check(cache: Path, alone: dict[str, str]) -> None:
    assert runs.digests(cache) == alone
    opened = open_cache(cache)
    assert read_index(cache, opened.manifest) is not None
    assert not verify(cache, hashes=True).findings


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_one_after_another(
    ranks: int, alone: dict[str, str], teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Rank 1 finds all but its own missing and takes them over: any node may die, the rest finish."""
    config = CacheConfig(**settings(teacher_folder, text_file, tmp_path / "c"), rank=1, ranks=ranks)
    assert not build_cache(config).already_done
    check(tmp_path / "c", alone)
    assert build_cache(config.model_copy(update={"rank": 0})).already_done


@pytest.mark.parametrize(
    ("engine", "workers"),
    [
        ("local", 2),
        pytest.param("torchrun", 2, marks=pytest.mark.slow),
        pytest.param("local", 4, marks=pytest.mark.slow),
        pytest.param("torchrun", 4, marks=pytest.mark.slow),
        pytest.param("ray", 2, marks=pytest.mark.slow),
        pytest.param("ray", 4, marks=pytest.mark.slow),
    ],
)
def test_same_bytes_whoever_makes_them(
    engine: str, workers: int, alone: dict[str, str], teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    run = runs.Run(engine, workers, tmp_path / "run", settings(teacher_folder, text_file, tmp_path / "c"))
    run.to_end()
    check(tmp_path / "c", alone)


def test_sigterm_finishes_the_shard_in_hand(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = runs.Run(
        "one", 1, tmp_path / "run", settings(teacher_folder, text_file, tmp_path / "c", sequences_per_shard=1)
    )
    process = run.start()
    try:
        deadline = time.monotonic() + 120
        while len(run.begun()) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        runs.end(process)
    assert "what was committed is kept" in (tmp_path / "run" / "out.txt").read_text()
    begun = {batch.shard for batch in run.begun()}
    opened = open_cache(tmp_path / "c", partial=True)
    assert len(opened) == len(begun) < opened.manifest.sequences  # whatever was begun is there
    assert len(list((tmp_path / "c" / "shards").iterdir())) == len(begun)


def test_killed_in_the_middle_of_a_shard(
    one_thread: None, teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the teacher gave before the kill is not asked for again, but for what was torn; files of others mislead nobody."""
    caplog.set_level(logging.DEBUG, "stillroom.pipeline.run")
    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_text(250, seed=2)))
    common = dict(sequences_per_shard=250, max_sequences=250, batch_size=1)
    run = runs.Run("one", 1, tmp_path / "run", settings(teacher_folder, text, tmp_path / "c", **common))
    process = run.start()
    deadline = time.monotonic() + 120
    while len(run.begun()) < 40:
        assert process.poll() is None, run.said()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    runs.end(process)
    assert runs.records(tmp_path / "c") == 0
    shutil.copytree(tmp_path / "c", tmp_path / "torn")
    (journal,) = (tmp_path / "torn" / "partial").iterdir()
    data = journal.read_bytes()
    journal.write_bytes(data[:-3])
    journal.with_name("000000-00000000000000ff.journal").write_bytes(data[:20] + b"another run" + data[31:])
    journal.with_name("000000-0123456789abcdef.journal").write_bytes(b"\xff" * 100_000)
    journal.with_name("notes").write_text("not ours")

    build_cache(CacheConfig(**settings(teacher_folder, text, tmp_path / "whole", **common)))
    before = len(run.begun())
    assert 40 <= before < 250
    for name, twice in (("c", (0, 1)), ("torn", (1, 2))):  # the batch at the teacher, and the torn one
        caplog.clear()
        result = build_cache(CacheConfig(**settings(teacher_folder, text, tmp_path / name, **common)))
        assert before + len(caplog.records) - 250 in twice
        assert (result.stats.sequences, result.stats.taken_up) == (250, 250 - len(caplog.records))
        check(tmp_path / name, runs.digests(tmp_path / "whole"))
    assert not (tmp_path / "c" / "partial").exists()
    assert [path.name for path in (tmp_path / "torn" / "partial").iterdir()] == ["notes"]


def test_watch_ends_with_the_run(
    teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_cache(CacheConfig(**settings(teacher_folder, text_file, tmp_path / "c", max_sequences=4)))
    assert main(["inspect", str(tmp_path / "c"), "--watch"]) == 0
    assert "is complete: 2/2 shards" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "c"), "--watch", "0.1", "--json"]) == 0
    assert '"shards_done": 2' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "2"], ["--workers", "--engine local"]),
        (["--engine", "locl"], ["--engine", "local"]),
        (["--rank", "1"], ["--ranks"]),
        (["--engine", "ray", "--rank", "0", "--ranks", "2"], ["--rank"]),
        (["--engine", "local", "--workers", "2", "--teacher", "nowhere"], ["nowhere"]),
    ],
)
def test_refusals(
    flags: list[str],
    words: list[str],
    teacher_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--teacher", str(teacher_folder), "--data", str(text_file), "--out", str(tmp_path / "c")]
    assert main(["cache", *common, *flags]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err.splitlines()[-1]


def test_ray_not_installed_is_one_sentence(
    teacher_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what an import finds where it is not installed
    common = ["--teacher", str(teacher_folder), "--data", str(text_file), "--out", str(tmp_path / "c")]
    assert main(["cache", *common, "--engine", "ray"]) == 2
    assert "pip install 'stillroom[ray]'" in capsys.readouterr().err


@pytest.mark.slow
def test_more_workers_than_shards(
    teacher_folder: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CacheConfig(
        **settings(teacher_folder, text_file, tmp_path / "c", max_sequences=4), engine="local", workers=3
    )
    build_cache(config)
    assert "3 workers were asked for and there are 2 shards" in caplog.text
    assert len(open_cache(tmp_path / "c")) == 4
    caplog.clear()
    late = config.model_copy(update={"engine": "ranks", "workers": None, "rank": 5, "ranks": 6})
    build_cache(late)
    assert "worker 5 of 6 has nothing to do" in caplog.text


@pytest.fixture(scope="module")
def heavy(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of 200 shards of four batches of some hundredths of a second each, and the digests of their cache."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("heavy")
    make_tokenizer(folder / "teacher")
    wide = llama_config(hidden_size=320, intermediate_size=896, num_hidden_layers=6, num_attention_heads=4)
    LlamaForCausalLM(wide).save_pretrained(folder / "teacher")
    text = folder / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_text(3200, seed=1)))
    common = dict(seq_len=64, sequences_per_shard=8, batch_size=2, max_sequences=1600)
    whole = settings(folder / "teacher", text, folder / "whole", **common)
    assert build_cache(CacheConfig(**whole)).shards == 200
    return whole, dict(runs.digests(folder / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["local", "torchrun", "ray"])
def test_kills(
    engine: str, heavy: tuple[dict[str, Any], dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four workers, one of them killed every few seconds: no kill costs a shard of the teacher's work.

    torchrun ends all four when one dies; its seconds are counted from the first batch of those that come after.
    """
    if engine == "ray":
        pytest.importorskip("ray")
    together = engine == "torchrun"
    whole, digests = heavy
    out = tmp_path / "c"
    run = runs.Run(engine, 4, tmp_path / "run", {**whole, "out": out}, restarts=100)
    saw = runs.kill_at_random(
        run, out, 200, kills=6, every_s=(0.5, 1.5) if together else (1.0, 3.0), together=together, seed=1
    )
    wasted = (saw["sequences"] - 1600) / 8
    with capsys.disabled():
        print(f"\n{engine}: {saw}, {wasted / saw['kills']:.2f} shards of the teacher's work wasted a kill")
    assert saw["kills"] >= 5
    assert 0 <= wasted <= saw["kills"]
    check(out, digests)
    assert not (out / "partial").exists()
