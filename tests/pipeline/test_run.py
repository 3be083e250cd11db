"""Stage one through its public door: same bytes whatever the batch, resume, refusals, audit line."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stillroom
from stillroom.pipeline.audit import audit_line
from stillroom.pipeline.config import CacheConfig, TeacherConfig
from stillroom.pipeline.run import build_cache
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.errors import PlanMismatchError


def _config(teacher: Path, text: Path, out: Path, **changes: Any) -> CacheConfig:
    settings: dict[str, Any] = dict(teacher=str(teacher), data=str(text), out=out, seq_len=32, sequences_per_shard=8)
    return CacheConfig(**{**settings, **changes})


def _array_digests(root: Path) -> dict[str, str]:
    """SHA-256 of every object of every shard, by shard number and name (attempt names differ between runs)."""
    return {
        f"{path.relative_to(root / 'shards').parts[0][:6]}/{'/'.join(path.relative_to(root / 'shards').parts[1:])}":
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "shards").rglob("*")) if path.is_file()
    }  # fmt: skip


def test_targets_are_the_teachers(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Against a plain forward of the plain model: label log p, entropy, and the kept weights of the head."""
    from transformers import AutoModelForCausalLM

    build_cache(_config(teacher_folder, text_file, tmp_path / "c"))
    cache = stillroom.open_cache(tmp_path / "c")
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    for index in (0, len(cache) - 1):
        item = cache[index]
        tokens = torch.from_numpy(item.tokens.astype(np.int64))
        with torch.no_grad():
            logp_LV = model(input_ids=tokens[None, :-1]).logits[0].double().log_softmax(-1).numpy()
        label_L = logp_LV[np.arange(32), item.tokens[1:].astype(np.int64)]
        np.testing.assert_allclose(item.targets.label_logp, label_L, atol=0.01)
        np.testing.assert_allclose(item.targets.entropy, -(np.exp(logp_LV) * logp_LV).sum(-1), atol=0.05)
        row_E = np.repeat(np.arange(32), np.diff(item.targets.offsets))
        p_E = np.exp(logp_LV[row_E, item.targets.ids])
        head = p_E > 1.05 / 50
        np.testing.assert_allclose(item.targets.weights[head], p_E[head], atol=0.05)
        np.testing.assert_allclose(np.bincount(row_E, item.targets.weights), 1.0, atol=1e-12)


def test_same_bytes_for_any_batch_size_and_thread_count(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    build_cache(_config(teacher_folder, text_file, tmp_path / "a", batch_size=1))
    build_cache(_config(teacher_folder, text_file, tmp_path / "b", batch_size=8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    build_cache(_config(teacher_folder, text_file, tmp_path / "c", batch_size=5))
    torch.set_num_threads(threads)
    digests = _array_digests(tmp_path / "a")
    assert len(digests) > 10
    assert _array_digests(tmp_path / "b") == digests
    assert _array_digests(tmp_path / "c") == digests


@pytest.mark.parametrize("sampler", ["threshold", "random", "systematic", "stratified", "top_k", "top_p"])
def test_every_sampler_writes_a_cache_that_reads(
    sampler: str, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    extra = {"top_p": 0.9} if sampler == "top_p" else {}
    build_cache(_config(teacher_folder, text_file, tmp_path / "c", sampler=sampler, draws=20, max_sequences=9, **extra))
    cache = stillroom.open_cache(tmp_path / "c")
    assert len(cache) == 9
    sums = np.add.reduceat(cache[3].targets.weights.astype(np.float64), cache[3].targets.offsets[:-1])
    if sampler in ("top_k", "top_p"):
        assert (sums < 1).all()
        assert (sums > 0.2).all()
    else:
        np.testing.assert_allclose(sums, 1.0, atol=1e-6)


def test_complete_cache_is_left_alone(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = _config(teacher_folder, text_file, tmp_path / "c")
    assert not build_cache(config).already_done
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    assert build_cache(config).already_done
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before


def test_other_runs_are_refused_by_name(
    teacher_folder: Path, text_file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = _config(teacher_folder, text_file, tmp_path / "c", max_sequences=8)
    build_cache(config)
    other = tmp_path_factory.mktemp("other-teacher")
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-4 * torch.randn_like(model.model.layers[1].mlp.up_proj.weight))
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(other)
    for change, word in (
        ({"teacher": str(other)}, "teacher"),
        ({"draws": 25}, "sampler"),
        ({"sampler": "random"}, "sampler"),
        ({"seed": 7}, "sampler"),
        ({"max_sequences": 7}, "sequences"),
        ({"seq_len": 16}, "seq_len"),
        ({"sequences_per_shard": 4}, "sequences_per_shard"),
    ):
        with pytest.raises(PlanMismatchError) as caught:
            build_cache(config.model_copy(update=change))
        assert word in str(caught.value).lower(), change
    assert build_cache(config).already_done


def test_killed_and_run_again_gives_the_same_bytes(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        return [
            sys.executable, "-m", "stillroom", "cache", "--teacher", str(teacher_folder), "--data", str(text_file),
            "--out", str(out), "--seq-len", "32", "--sequences-per-shard", "2",
        ]  # fmt: skip

    process = subprocess.Popen(command(tmp_path / "c"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "c" / "commits").glob("*.json"))) < 3:
        assert process.poll() is None, "it must still be running when it is killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p.name: p.read_bytes() for p in (tmp_path / "c" / "commits").glob("*.json")}
    whole = build_cache(_config(teacher_folder, text_file, tmp_path / "whole", sequences_per_shard=2))
    assert 3 <= len(kept) < whole.shards
    result = build_cache(_config(teacher_folder, text_file, tmp_path / "c", sequences_per_shard=2))
    assert result.shards_before == len(kept)
    assert {name: (tmp_path / "c" / "commits" / name).read_bytes() for name in kept} == kept
    one, other = stillroom.open_cache(tmp_path / "c"), stillroom.open_cache(tmp_path / "whole")
    for index in range(len(other)):
        for field in ("offsets", "ids", "weights", "logp", "label_logp", "entropy"):
            np.testing.assert_array_equal(getattr(one[index].targets, field), getattr(other[index].targets, field))


def test_soft_capped_logits_are_taken_whole(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """A model whose head does more than a matrix product is run through its own forward."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    settings = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, final_logit_softcapping=2.0, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    Gemma2ForCausalLM(settings).save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "gemma")
    teacher = Teacher(TeacherConfig(teacher=str(tmp_path / "gemma")))
    assert not teacher.chunked_head
    assert next(iter(teacher.logits(torch.zeros(1, 8, dtype=torch.int64)))).abs().max() <= 2.0
    assert Teacher(TeacherConfig(teacher=str(teacher_folder))).chunked_head


def test_audit_line_tells_sound_from_biased(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    teacher = Teacher(TeacherConfig(teacher=str(teacher_folder)))
    for name, sampler, sound in (("t", "threshold", True), ("s", "systematic", True), ("k", "top_k", False)):
        build_cache(_config(teacher_folder, text_file, tmp_path / name, sampler=sampler, draws=12))
        line = audit_line(stillroom.open_cache(tmp_path / name), teacher, sequences=32)
        assert line.sound is sound, str(line)
        assert line.label_gap < 0.02
    assert line.rows == 32 * 32
