"""Many writers, many SIGKILLs: nothing lost, nothing twice, nothing unreadable, nothing computed again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stillroom.storage.cache import open_cache
from stillroom.storage.verify import verify
from stillroom.storage.writer import CacheWriter

SCRIPT = Path(__file__).with_name("crash_writers.py")


@pytest.fixture(scope="module")
def crash_writers(made):
    sys.modules.setdefault("made", made)
    spec = importlib.util.spec_from_file_location("crash_writers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(root: Path, *options: object) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(root), *map(str, options)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (root / "commits").glob("*.json")}


def check(crash_writers, made, root: Path, *, kills: int, seed: int, shards: int, sequences: int, seq_len: int) -> None:
    size = ("--shards", shards, "--sequences", sequences, "--seq-len", seq_len)
    saw = run(root, "--kills", kills, "--seed", seed, *size)
    print(saw)
    assert saw["kills"] == kills
    assert saw["failed writers"] == 0
    assert saw["records changed"] == 0
    assert saw["records"] == shards

    # 0 lost, 0 twice, 0 unreadable: each row is what its shard's data say, in its place.
    manifest = crash_writers.plan(shards, sequences, seq_len)
    cache = open_cache(root)
    assert len(cache) == manifest.sequences
    undisturbed, tokens = CacheWriter(root.with_name("clean"), manifest), []
    for index in range(shards):
        data = made.shard_data(manifest, index)
        tokens.append(data[0])
        assert undisturbed.write_shard(index, *data).objects == cache.record(index).objects
    np.testing.assert_array_equal(cache.read(range(len(cache))).tokens, np.concatenate(tokens))
    report = verify(root, hashes=True)
    assert report.missing == ()
    assert not [finding for finding in report.findings if finding.recompute], report.findings

    # A further run has nothing to do, and touches nothing.
    before = digests(root)
    log = root.with_name(root.name + ".log")
    begun = log.read_text().count("start")
    run(root, "--kills", 0, *size)
    assert log.read_text().count("start") == begun
    assert digests(root) == before

    # What the kills left behind goes when it is old, and nothing else.
    writer = CacheWriter(root, manifest)
    writer.collect_orphans(0.0)
    assert {path.name for path in (root / "shards").iterdir()} == {
        Path(cache.record(index).path).name for index in range(shards)
    }
    assert not list(root.rglob("*.tmp"))
    assert open_cache(root).read(range(0, manifest.sequences, 7)).tokens.shape[1] == seq_len + 1


def test_kills(crash_writers, made, tmp_path):
    check(crash_writers, made, tmp_path / "cache", kills=12, seed=0, shards=16, sequences=2, seq_len=16)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("seed", "sequences", "seq_len"), [(1, 2, 16), (2, 8, 64), (3, 24, 128)])
def test_50_kills(crash_writers, made, tmp_path, seed, sequences, seq_len):
    check(
        crash_writers, made, tmp_path / "cache", kills=50, seed=seed, shards=100, sequences=sequences, seq_len=seq_len
    )
