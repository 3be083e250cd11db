"""Stages between tokens and shards: same bytes whatever is interrupted or runs short, bad logits, masks, time and memory."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stillroom
from stillroom.cli import main
from stillroom.pipeline import stages
from stillroom.pipeline.config import CacheConfig, TeacherConfig
from stillroom.pipeline.prepare import prepare
from stillroom.pipeline.run import RunStats, build_cache, run_shards
from stillroom.pipeline.stage_clock import STAGES
from stillroom.pipeline.stages import Batch, Sampling
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.errors import InputError
from stillroom.storage.spec import SamplerSpec

ROWS = 32


def _config(teacher: Path, text: Path, out: Path, **changes: Any) -> CacheConfig:
    settings: dict[str, Any] = dict(
        teacher=str(teacher), data=str(text), out=out, seq_len=ROWS, sequences_per_shard=7, max_sequences=25
    )
    return CacheConfig(**{**settings, **changes})


def _digests(root: Path) -> dict[tuple[str, str], str]:
    """SHA-256 of every object of every shard, by shard number and name (attempt names differ between runs)."""
    files = [path for path in sorted((root / "shards").rglob("*")) if path.is_file()]
    parts = [path.relative_to(root / "shards").parts for path in files]
    return {
        (first[:6], "/".join(rest)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path, (first, *rest) in zip(files, parts)
    }


@pytest.fixture(scope="module")
def whole(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of four shards made in one go."""
    out = tmp_path_factory.mktemp("whole") / "c"
    result = build_cache(_config(teacher_folder, text_file, out))
    assert result.shards == result.stats.shards == 4
    assert result.stats.sequences == 25
    assert list(result.stats.stages) == list(STAGES)
    assert all(seconds >= 0 for seconds in result.stats.stages.values())
    assert min(result.stats.stages[name] for name in ("forward", "head", "sample", "encode", "commit")) > 0
    assert result.stats.peak_host_bytes > 1 << 20
    return out


def test_same_bytes_interrupted_at_any_shard(
    whole: Path, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for made in (1, 2, 3):
        config = _config(teacher_folder, text_file, tmp_path / str(made), batch_size=made)
        assert run_shards(prepare(config), range(made)).shards == made
        result = build_cache(config)
        assert (result.shards_before, result.stats.shards) == (made, 4 - made)
        assert _digests(tmp_path / str(made)) == _digests(whole)


def test_same_bytes_and_no_work_twice_interrupted_at_any_batch(
    whole: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four shards of four batches (the last of two): the run is left after each, and goes on behind it."""
    caplog.set_level(logging.DEBUG, "stillroom.pipeline.run")
    loaded = prepare(_config(teacher_folder, text_file, tmp_path / "loaded", batch_size=2))
    for made in range(1, 14):
        prepared = replace(loaded, config=loaded.config.model_copy(update={"out": tmp_path / str(made)}))
        told: list[int] = []

        def leave(stage: str, done: int, total: int, told: list[int] = told, made: int = made) -> None:
            told.append(done)
            if len(told) == made:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_shards(prepared, range(4), leave)
        stats = run_shards(prepared, range(4))
        there = 25 - stats.sequences  # in shards that were committed
        assert there + stats.taken_up == told[-1]
        assert _digests(tmp_path / str(made)) == _digests(whole)
        assert not (tmp_path / str(made) / "partial").exists()
    asked = [record.args[2] for record in caplog.records if record.name == "stillroom.pipeline.run"]
    assert len(asked) == 13 * 14
    assert sum(asked) == 13 * 25


def _short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Make the teacher raise what CUDA raises for batches above `most`; the sizes it was asked for."""
    from transformers import LlamaModel

    forward, asked = LlamaModel.forward, list[int]()

    def limited(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        asked.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(LlamaModel, "forward", limited)
    return asked


def test_out_of_memory_halves_the_batch_once(
    whole: Path,
    teacher_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = _short_of_memory(monkeypatch, 4)
    with caplog.at_level(logging.WARNING, "stillroom"):
        result = build_cache(_config(teacher_folder, text_file, tmp_path / "c", batch_size=8))
    assert asked.count(8) == 1
    assert set(asked[asked.index(8) + 1 :]) == {4}
    assert len(result.stats.notes) == 1
    assert "8 sequences a batch: going on with 4" in result.stats.notes[0]
    assert result.stats.notes[0] in caplog.text
    assert _digests(tmp_path / "c") == _digests(whole)
    _short_of_memory(monkeypatch, 2)
    with pytest.raises(InputError, match="out of memory with 4 sequences a batch: lower --batch-size"):
        build_cache(_config(teacher_folder, text_file, tmp_path / "d", batch_size=8))


def _spoilt(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """Make the teacher answer NaN after token `bad`, and nowhere else."""
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def with_nan(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        output = forward(self, input_ids=input_ids, **inputs)
        output.last_hidden_state[input_ids == bad] = torch.nan
        return output

    monkeypatch.setattr(LlamaModel, "forward", with_nan)


def test_bad_logits_stop_the_run_by_name(
    whole: Path,
    teacher_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens_SL = stillroom.open_cache(whole).read(range(25)).tokens[:, :-1]
    bad = int(tokens_SL[9, 5])
    sequence, row = np.argwhere(tokens_SL == bad)[0]
    _spoilt(monkeypatch, bad)
    arguments = ["cache", "--teacher", teacher_folder, "--data", text_file, "--out", tmp_path / "c", "--seq-len", ROWS]
    assert main([str(a) for a in [*arguments, "--sequences-per-shard", 7, "--max-sequences", 25]]) == 2
    said = capsys.readouterr().err
    assert re.search(f"NaN or infinite at sequence {sequence}, row {row}( and|:)", said)
    assert "--skip-bad-rows" in said


def test_bad_rows_keep_nothing_and_are_counted(
    whole: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = stillroom.open_cache(whole)
    bad = int(sound[9].tokens[5])
    _spoilt(monkeypatch, bad)
    result = build_cache(_config(teacher_folder, text_file, tmp_path / "c", skip_bad_rows=True, batch_size=3))
    cache, left_out = stillroom.open_cache(tmp_path / "c"), 0
    for index in range(len(cache)):
        item, whole_item = cache[index], sound[index]
        kept_L = item.tokens[:-1] != bad
        lengths_L = np.diff(whole_item.targets.offsets)
        np.testing.assert_array_equal(np.diff(item.targets.offsets), np.where(kept_L, lengths_L, 0))
        np.testing.assert_array_equal(item.targets.ids, whole_item.targets.ids[np.repeat(kept_L, lengths_L)])
        left_out += int((~kept_L).sum())
    assert 0 < left_out == result.stats.bad_rows < len(cache) * ROWS
    assert main(["verify", str(tmp_path / "c"), "--hashes"]) == 0


def test_bad_rows_are_counted_once_and_only_wanted_ones_taken_up(
    whole: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = int(stillroom.open_cache(whole)[9].tokens[5])
    _spoilt(monkeypatch, bad)
    skipping = _config(
        teacher_folder, text_file, tmp_path / "c", skip_bad_rows=True, batch_size=1, sequences_per_shard=25
    )

    def leave(stage: str, done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_shards(prepare(skipping), [0], leave)
    with pytest.raises(InputError, match="NaN or infinite"):
        build_cache(skipping.model_copy(update={"skip_bad_rows": False}))
    stats = run_shards(prepare(skipping), [0])
    assert stats.taken_up == 20
    tokens = stillroom.open_cache(whole).read(range(25)).tokens
    assert stats.bad_rows == int((tokens[:, :-1] == bad).sum())


def test_masked_rows_keep_nothing_and_change_no_other(teacher_folder: Path) -> None:
    teacher, spec = Teacher(TeacherConfig(teacher=str(teacher_folder))), SamplerSpec()
    rng = np.random.default_rng(0)
    tokens_BL1 = rng.integers(0, 256, (5, ROWS + 1)).astype(np.uint32)
    keep_BL = rng.random((5, ROWS)) < 0.5
    keep_BL[2] = False
    ((_, every),) = Sampling(teacher, spec, batch_size=5)([Batch(3, tokens_BL1)])
    ((_, some),) = Sampling(teacher, spec, batch_size=5)([Batch(3, tokens_BL1, keep_BL=keep_BL)])
    kept_R = keep_BL.ravel()
    np.testing.assert_array_equal(np.diff(some.offsets), np.where(kept_R, np.diff(every.offsets), 0))
    kept_E = np.repeat(kept_R, np.diff(every.offsets))
    for name in ("ids", "weights", "logp"):
        np.testing.assert_array_equal(getattr(some, name), getattr(every, name)[kept_E])
    for name in ("label_logp", "entropy"):
        np.testing.assert_array_equal(getattr(some, name)[kept_R], getattr(every, name)[kept_R])
    assert np.isnan(some.label_logp[~kept_R]).all()


def test_long_sequences_go_in_even_pieces(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path, tmp_path: Path
) -> None:
    """Logits of a sequence may be more than there is room for; then no more than the room is alive."""
    teacher, spec = Teacher(TeacherConfig(teacher=str(teacher_folder))), SamplerSpec()
    tokens_BL1 = np.random.default_rng(0).integers(0, 256, (3, ROWS + 1)).astype(np.uint32)
    ((_, at_once),) = Sampling(teacher, spec, batch_size=3)([Batch(0, tokens_BL1)])
    monkeypatch.setitem(stages.LOGITS_BYTES, "cpu", 4 * teacher.vocab_size * 10)
    asked: list[tuple[int, ...]] = []
    head = teacher.head
    monkeypatch.setattr(teacher, "head", lambda rows, out: asked.append(tuple(out.shape)) or head(rows, out))
    ((_, pieces),) = Sampling(teacher, spec, batch_size=3)([Batch(0, tokens_BL1)])
    assert asked == [(8, teacher.vocab_size)] * 12
    np.testing.assert_allclose(pieces.label_logp, at_once.label_logp, atol=1e-4)
    np.testing.assert_allclose(pieces.entropy, at_once.entropy, atol=1e-4)


def test_figures_of_several_processes_together() -> None:
    one = RunStats(2, 20, 3.0, {"forward": 1.0, "wait": 0.5}, 1, 100, None, ("a",))
    other = RunStats(1, 10, 4.0, {"forward": 2.0}, 2, 50, 70, ())
    assert RunStats.together([one, other]) == RunStats(3, 30, 4.0, {"forward": 3.0, "wait": 0.5}, 3, 100, 70, ("a",))
