from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.stream import StreamOrder
from stillroom.train.config import TrainConfig
from stillroom.train.data import OrderSampler
from stillroom.train.folder import RunFolder
from stillroom.train.run import train_student

Tokens = npt.NDArray[np.uint32]
Settings = Callable[..., TrainConfig]
Maker = Callable[..., Path]


def _weights(out: Path) -> dict[str, npt.NDArray[np.float32]]:
    return load_file(out / "model.safetensors")


def _metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _same(a: Path, b: Path) -> bool:
    first, second = _weights(a), _weights(b)
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def test_it_is_the_loop_one_would_write_by_hand(settings: Settings, cache: Path, student: Path) -> None:
    alpha, steps, lr = 0.2, 12, 1e-2
    config = settings(cache=cache, alpha=alpha, steps=steps, lr=lr, warmup=0.25, schedule="cosine", weight_decay=0.1)
    seen: list[tuple[int, int]] = []
    result = train_student(config, on_progress=lambda done, total, metrics: seen.append((done, total)))
    logged = _metrics(config.out)

    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == flat] for flat in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    opened = open_cache(cache)
    losses, order = [], OrderSampler(StreamOrder([len(opened)], seed=0), batch_size=8, steps=steps)
    for step in range(steps):
        factor = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / (steps - 3)))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        rows = []
        for index in order.step(step):
            tokens, targets = opened[int(index)]
            tokens = torch.from_numpy(tokens.astype(np.int64))
            logq_LV = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
            for row in range(len(tokens) - 1):
                one = targets.slice_rows(row, row + 1)
                weight, ids = torch.from_numpy(one.weights), torch.from_numpy(one.ids).long()
                kd = (weight * (weight.log() - logq_LV[row, ids])).sum()
                rows.append((1 - alpha) * kd - alpha * logq_LV[row, tokens[row + 1]])
        loss = torch.stack(rows).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert [m["loss"] for m in logged] == pytest.approx(losses, abs=1e-5)
    assert logged[-1]["loss"] < 0.95 * logged[0]["loss"]
    assert [m["step"] for m in logged] == list(range(1, steps + 1))
    for m in logged:
        assert m["loss"] == pytest.approx((1 - alpha) * m["kd"] + alpha * m["ce"], rel=1e-5)
    assert result.steps == steps
    assert result.tokens == steps * 8 * opened.manifest.packing.seq_len == logged[-1]["tokens"]
    assert result.loss == logged[-1]["loss"]
    assert (12, 12) in seen
    assert seen[0] == (1, 12)


@pytest.mark.parametrize("asked", [False, True])
def test_parts_of_a_batch_change_nothing(
    settings: Settings, cache: Path, teacher: Path, tmp_path: Path, asked: bool
) -> None:
    """8 sequences at once, in 4 parts of 2, and in 3 unequal parts."""
    live = str(teacher) if asked else None
    for parts in (1, 4, 3):
        train_student(settings(cache=cache, teacher=live, grad_accumulation=parts, steps=4, out=tmp_path / str(parts)))
    for parts in (4, 3):
        for a, b in zip(_metrics(tmp_path / "1"), _metrics(tmp_path / str(parts))):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


INTERRUPTED = """
import os, signal, sys, json
import numpy as np, torch
torch.set_num_threads(1)
from stillroom.train.config import TrainConfig
from stillroom.train.run import train_student

def progress(done, total, metrics):
    if done == 8:
        os.kill(os.getpid(), signal.SIGKILL)

train_student(TrainConfig(**json.loads(sys.argv[1])), on_progress=progress)
"""


def test_killed_and_resumed_ends_in_the_same_bytes(
    settings: Settings, cache: Path, save_config: Maker, tmp_path: Path
) -> None:
    """With dropout, so that the generators must resume too; Muon, so that both optimizers must; the kill is real."""
    student = save_config(tmp_path / "student", attention_dropout=0.2)
    common = dict(cache=cache, student=str(student), optimizer="muon", lr=0.02, steps=12, save_every=3, log_every=2)
    whole = settings(**common, out=tmp_path / "whole")
    train_student(whole)
    cut = settings(**common, out=tmp_path / "cut")
    killed = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, cut.model_dump_json()], capture_output=True, text=True, timeout=200
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (cut.out / "model.safetensors").exists()
    assert {p.name for p in RunFolder(cut.out).checkpoints()} == {"checkpoint-3", "checkpoint-6"}
    steps: list[int] = []
    result = train_student(cut, on_progress=lambda done, total, metrics: steps.append(done))
    assert steps[0] == 7
    assert result.steps == 12
    assert not any("incomplete" in note for note in result.notes)
    assert _same(whole.out, cut.out)
    assert [m["step"] for m in _metrics(cut.out)] == [m["step"] for m in _metrics(whole.out)]
    assert _metrics(cut.out)[-1]["loss"] == _metrics(whole.out)[-1]["loss"]


@pytest.mark.parametrize("damage", ["truncated optimizer", "no marker", "no state", "flipped bit"])
def test_a_broken_last_checkpoint_falls_back(
    settings: Settings, cache: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(cache=cache, steps=9, save_every=3)

    def stop(done: int, total: int, metrics: dict[str, Any]) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(config, on_progress=stop)
    last = config.out / "checkpoint-6"
    if damage == "truncated optimizer":
        os.truncate(last / "optimizer.pt", 100)
    elif damage == "flipped bit":
        data = bytearray((last / "optimizer.pt").read_bytes())
        data[len(data) // 2] ^= 1
        (last / "optimizer.pt").write_bytes(data)
    else:
        (last / {"no marker": "complete.json", "no state": "trainer_state.json"}[damage]).unlink()
    steps: list[int] = []
    result = train_student(config, on_progress=lambda done, total, metrics: steps.append(done))
    assert steps[0] == 4
    said = "checkpoint-6 is incomplete"
    if damage == "flipped bit":
        said = "checkpoint-6 is damaged (optimizer.pt is not what was written)"
    assert any(said in n and "going on from checkpoint-3" in n for n in result.notes)
    assert said in caplog.text
    whole = settings(cache=cache, steps=9, out=tmp_path / "whole")
    train_student(whole)
    assert _same(config.out, whole.out)


def test_finished_runs_are_left_and_others_refused(
    settings: Settings, cache: Path, student: Path, tmp_path: Path
) -> None:
    config = settings(cache=cache, steps=3, save_every=2)
    first = train_student(config)
    assert not first.already_done
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob("*")}
    again = train_student(config.model_copy(update={"log_every": 7, "save_every": 9}))
    assert again.already_done
    assert (again.steps, again.tokens, again.loss) == (first.steps, first.tokens, first.loss)
    assert {p: p.stat().st_mtime_ns for p in config.out.rglob("*")} == before
    moved = tmp_path / "moved"
    shutil.copytree(cache, moved)
    assert train_student(config.model_copy(update={"cache": moved})).already_done
    with pytest.raises(InputError, match=r"other settings \(lr is 0.5, was 0.01\)"):
        train_student(config.model_copy(update={"lr": 0.5}))
    with pytest.raises(InputError, match="steps is 4, was 3"):
        train_student(config.model_copy(update={"steps": 4}))
    fresh = train_student(config.model_copy(update={"resume": False}))
    assert not fresh.already_done
    assert fresh.loss == first.loss
    record = json.loads((config.out / "run.json").read_text())
    assert record["config"]["lr"] == 0.01
    assert record["libraries"]["torch"] == torch.__version__


def test_a_run_killed_before_its_last_word_only_saves_again(settings: Settings, cache: Path) -> None:
    config = settings(cache=cache, steps=4, save_every=3)
    first = train_student(config)
    before = _weights(config.out)
    for name in ("result.json", "model.safetensors"):
        (config.out / name).unlink()
    steps: list[int] = []
    again = train_student(config, on_progress=lambda done, total, metrics: steps.append(done))
    assert steps == []
    assert not again.already_done
    assert (again.steps, again.loss, again.seconds) == (first.steps, first.loss, first.seconds)
    assert all(np.array_equal(before[k], w) for k, w in _weights(config.out).items())


def test_the_student_opens_without_stillroom(
    settings: Settings, make_cache: Maker, teacher_folder: Path, student_config: Path, tmp_path: Path
) -> None:
    """V = 300 student with the tokenizer the cache carries, opened by a Python that never imports us."""
    cache = make_cache()
    (cache / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(teacher_folder / file, cache / "tokenizer" / file)
    (cache / "tokenizer" / "vocab.json").symlink_to("/etc/passwd")
    config = settings(cache=cache, student=str(student_config), steps=2)
    result = train_student(config)
    assert any("padded: 203 of its 300 logits" in note for note in result.notes)
    assert not (config.out / "vocab.json").exists()
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert not any(n.startswith('stillroom') for n in sys.modules)\n"
        "out = m.generate(**t('the still room', return_tensors='pt'), max_new_tokens=3, do_sample=False)\n"
        "print(m.config.use_cache, m.dtype, out.shape[1] > 3)"
    )
    opened = subprocess.run(
        [sys.executable, "-c", code, str(config.out)], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert opened.stdout.split() == ["True", "torch.float32", "True"], opened.stderr
    card = (config.out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- stillroom\n- distillation\n---\n")
    assert "| loss | forward_kl |" in card
    assert "tttttttttttttttt" in card  # the teacher's fingerprint


def test_live_teacher_and_plain_text(settings: Settings, teacher: Path, tokens_SL1: Tokens, tmp_path: Path) -> None:
    text = settings(loss="ce", out=tmp_path / "ce", steps=30, optimizer="muon", lr=0.02)
    train_student(text, tokens_SL1=tokens_SL1)
    assert _metrics(text.out)[-1]["loss"] < 0.8 * _metrics(text.out)[0]["loss"]
    assert "kd" not in _metrics(text.out)[0]
    live = settings(teacher=str(teacher), out=tmp_path / "kd", steps=30)
    train_student(live, tokens_SL1=tokens_SL1)
    assert _metrics(live.out)[-1]["kd"] < 0.8 * _metrics(live.out)[0]["kd"]


def test_a_prefix_of_the_sequences(settings: Settings, tokens_SL1: Tokens, tmp_path: Path) -> None:
    """Training on the first 16 sequences is training on a text that has no others, and steps follow from epochs."""
    common = dict(loss="ce", steps=None, epochs=2.5)
    result = train_student(settings(**common, max_sequences=16, out=tmp_path / "a"), tokens_SL1=tokens_SL1)
    train_student(settings(**common, out=tmp_path / "b"), tokens_SL1=tokens_SL1[:16])
    assert result.steps == 5
    assert _same(tmp_path / "a", tmp_path / "b")


def test_a_loss_that_is_not_finite_ends_the_run(settings: Settings, tokens_SL1: Tokens) -> None:
    with pytest.raises(InputError, match=r"the loss became nan by step \d+: lower --lr"):
        train_student(settings(loss="ce", lr=1e30, schedule="constant", warmup=0), tokens_SL1=tokens_SL1)


def test_bfloat16_products_keep_float32_weights(settings: Settings, cache: Path) -> None:
    config = settings(cache=cache, steps=2, dtype="bfloat16")
    train_student(config)
    assert {w.dtype for w in _weights(config.out).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", ["top_k", "top_p"])
def test_partial_caches_must_name_what_they_miss(
    settings: Settings, make_cache: Maker, kind: str, tmp_path: Path
) -> None:
    cache = make_cache(kind=kind, top_p=0.8 if kind == "top_p" else 1.0)
    with pytest.raises(InputError, match="truncate, renormalise_teacher, renormalise_both or tail_bucket"):
        train_student(settings(cache=cache))
    losses = set()
    for missing in ("truncate", "renormalise_teacher", "renormalise_both", "tail_bucket"):
        train_student(settings(cache=cache, missing=missing, allow_biased=True, steps=1, out=tmp_path / missing))
        losses.add(round(_metrics(tmp_path / missing)[0]["loss"], 4))
    assert len(losses) == 4
