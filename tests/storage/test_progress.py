"""How far a cache is, from its commit records alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillroom.storage.depot import Directory
from stillroom.storage.errors import NotACacheError
from stillroom.storage.progress import WINDOW_S, Watch
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.writer import CacheWriter


def test_rate_is_of_the_last_minute(made, tmp_path: Path) -> None:
    manifest = made.manifest(SamplerSpec(draws=20), vocab_size=500, seq_len=16, sequences=15, sequences_per_shard=2)
    writer = CacheWriter(tmp_path / "c", manifest)
    now = [0.0]
    watch = Watch(Directory(tmp_path / "c"), clock=lambda: now[0])
    seen = watch.look()
    assert (seen.shards_done, seen.shards, seen.rows_done, seen.rows) == (0, 8, 0, 240)
    assert seen.rows_per_s is None
    assert not seen.complete
    rates = []
    for index in range(8):
        writer.write_shard(index, *made.shard_data(manifest, index))
        now[0] += 10.0 if index < 4 else 40.0
        seen = watch.look()
        rates.append(seen.rows_per_s)
        assert seen.shards_done == index + 1
    assert rates[:4] == pytest.approx([3.2] * 4)  # 32 rows every 10 s
    assert rates[6] == pytest.approx(64 / 80)  # two shards: the look 80 s ago is the youngest older than the window
    assert rates[7] == pytest.approx(48 / 80)  # the last shard has one sequence
    assert seen.complete
    assert seen.rows_done == 240
    assert "8/8 shards" in str(seen)


def test_rate_falls_while_nothing_comes(made, tmp_path: Path) -> None:
    manifest = made.manifest(SamplerSpec(draws=20), vocab_size=500, seq_len=16, sequences=8, sequences_per_shard=2)
    now = [0.0]
    writer = CacheWriter(tmp_path / "c", manifest)
    watch = Watch(Directory(tmp_path / "c"), clock=lambda: now[0])
    watch.look()
    writer.write_shard(0, *made.shard_data(manifest, 0))
    now[0] = 10.0
    first = watch.look()
    assert first.rows_per_s == pytest.approx(3.2)
    assert first.left_s == pytest.approx(30.0)
    for _ in range(20):
        now[0] += WINDOW_S / 4
        seen = watch.look()
    assert seen.rows_per_s == pytest.approx(32 / 310)


def test_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError, match="name a cache"):
        Watch(Directory(tmp_path))
