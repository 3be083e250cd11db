"""Crash safety with real processes: racing writers, kill -9, orphans, a directory of another run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import CacheError, PlanMismatchError
from stillroom.storage.files import put_if_absent
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.writer import CacheWriter

WORKER = Path(__file__).with_name("made.py")


def worker(root, pause_s=0.0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(root), str(pause_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_whole(made, root, reference):
    """Every shard is there with the bytes an undisturbed run writes."""
    cache, undisturbed = open_cache(root), open_cache(reference)
    assert [cache.record(i).objects for i in cache.shards] == [
        undisturbed.record(i).objects for i in undisturbed.shards
    ]
    np.testing.assert_array_equal(cache.read(range(60)).targets.ids, undisturbed.read(range(60)).targets.ids)


@pytest.fixture(scope="session")
def reference(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    made.write(root, made.RACE)
    return root


def test_two_processes_write_one_cache(made, tmp_path, reference):
    writers = [worker(tmp_path) for _ in range(2)]
    for process in writers:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert_whole(made, tmp_path, reference)
    assert len(list((tmp_path / "shards").iterdir())) == made.RACE.shards  # losers cleaned up after themselves
    assert not list(tmp_path.rglob("*.tmp"))


def test_kill_9_then_resume(made, tmp_path, reference):
    for _ in range(3):
        process = worker(tmp_path, 0.02)
        for line in process.stdout:  # in the middle of a shard, a while after the first one
            if line.startswith("start") and len(list((tmp_path / "commits").glob("*.json"))) % 5 == 4:
                break
        time.sleep(0.003)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    done = len(list((tmp_path / "commits").glob("[0-9]*.json")))
    assert 0 < done < made.RACE.shards
    with pytest.raises(CacheError, match=f"lacks {made.RACE.shards - done} of {made.RACE.shards} shards"):
        open_cache(tmp_path)
    partial = open_cache(tmp_path, partial=True)
    partial.read(range(len(partial)))  # what is committed is whole
    process = worker(tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("done") == made.RACE.shards - done  # nothing is computed twice
    assert_whole(made, tmp_path, reference)


def test_orphans_are_collected_when_old(made, tmp_path):
    manifest = made.manifest(SamplerSpec(draws=20))
    writer = made.write(tmp_path, manifest)
    young, old = tmp_path / "shards/000000-aaaaaaaa.zarr", tmp_path / "shards/000001-bbbbbbbb.zarr"
    temporary, foreign = tmp_path / "commits/.000001.json-77.tmp", tmp_path / "shards/notes.txt"
    for folder in (young, old):
        folder.mkdir()
        (folder / "zarr.json").write_text("{}")
    temporary.write_text("")
    foreign.write_text("kept")
    for path in (old, temporary, foreign, *(tmp_path / "shards").glob("00000?-*[!ab].zarr")):
        os.utime(path, (time.time() - 90_000,) * 2)
    CacheWriter(tmp_path, manifest)
    assert young.exists()
    assert foreign.exists()
    assert not old.exists()
    assert not temporary.exists()
    assert open_cache(tmp_path).read(range(6)).tokens.shape == (6, 17)  # the committed ones were old too
    assert writer.committed() == {0, 1}


def test_another_run_is_refused_and_names_what_differs(made, tmp_path):
    manifest = made.manifest(SamplerSpec(draws=20))
    CacheWriter(tmp_path, manifest)
    CacheWriter(tmp_path, dataclasses.replace(manifest, created="later", libraries={"numpy": "9"}))
    other = dataclasses.replace(manifest, sampler=SamplerSpec(draws=21))
    with pytest.raises(PlanMismatchError, match=r"sampler\.draws: 20, now 21"):
        CacheWriter(tmp_path, other)


def test_a_committed_shard_is_not_written_again(made, tmp_path):
    manifest = made.manifest(SamplerSpec(draws=20))
    writer = made.write(tmp_path, manifest)
    before = sorted(tmp_path.rglob("*"))
    record = writer.write_shard(1, *made.shard_data(manifest, 1))
    assert record == open_cache(tmp_path).record(1)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_loser_of_a_race_returns_the_winners_record(made, tmp_path, monkeypatch):
    manifest = made.manifest(SamplerSpec(draws=20))
    writer = CacheWriter(tmp_path, manifest)
    winner = writer.write_shard(0, *made.shard_data(manifest, 0))
    monkeypatch.setattr(writer, "record", lambda index: None)  # as if the other had finished in between
    assert writer.write_shard(0, *made.shard_data(manifest, 0)) == winner
    assert [path.name for path in (tmp_path / "shards").iterdir()] == [Path(winner.path).name]


def test_put_if_absent(tmp_path):
    assert put_if_absent(tmp_path / "x", b"first")
    assert not put_if_absent(tmp_path / "x", b"second")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"first")]


def test_a_partial_cache_knows_its_sequences(made, tmp_path):
    manifest = made.manifest(SamplerSpec(draws=20), sequences=9)
    writer = CacheWriter(tmp_path, manifest)
    for index in (0, 2):
        writer.write_shard(index, *made.shard_data(manifest, index))
    cache = open_cache(tmp_path, partial=True)
    assert (len(cache), cache.shards) == (6, (0, 2))
    assert [cache.sequence_number(i) for i in range(6)] == [0, 1, 2, 6, 7, 8]
    assert [cache.shard_of(i) for i in range(6)] == [0, 0, 0, 2, 2, 2]
    np.testing.assert_array_equal(cache[4].tokens, made.shard_data(manifest, 2)[0][1])


@pytest.mark.parametrize(
    "break_it", ["tokens", "targets", "rounding", "ids", "label", "sum", "twice", "logp", "NaN", "index"]
)
def test_shards_that_do_not_fit_are_refused(made, tmp_path, break_it):
    manifest = made.manifest(SamplerSpec(draws=20))
    tokens, targets, rounding = made.shard_data(manifest, 0)
    index, change = 0, {}
    if break_it == "tokens":
        tokens = tokens[:2]
    elif break_it == "targets":
        targets = targets.slice_rows(0, 8)
    elif break_it == "rounding":
        rounding = rounding + 1
    elif break_it == "ids":
        change = {"ids": targets.ids + np.int32(1000)}
    elif break_it == "label":
        tokens = tokens + np.uint32(300)
    elif break_it == "sum":
        change = {"weights": targets.weights / 2}
    elif break_it == "twice":
        change = {"ids": np.zeros_like(targets.ids)}
    elif break_it == "NaN":
        change["logp"] = np.where(np.arange(targets.entries) == 7, np.nan, targets.logp).astype(np.float32)
    elif break_it == "logp":
        change = {"logp": None}
    else:
        index = 7
    writer = CacheWriter(tmp_path, manifest)
    with pytest.raises(ValueError, match="wanted"):
        writer.write_shard(index, tokens, dataclasses.replace(targets, **change), rounding)
    assert writer.committed() == set()
    assert not list((tmp_path / "shards").iterdir())


def test_a_cache_without_its_records(made, tmp_path):
    made.write(tmp_path, made.manifest(SamplerSpec(draws=20)))
    shutil.rmtree(tmp_path / "commits")
    with pytest.raises(CacheError, match="records included"):
        open_cache(tmp_path)
