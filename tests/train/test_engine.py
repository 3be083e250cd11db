"""The engine's settings: each does what it says, and those that should change nothing change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from stillroom.storage.errors import InputError
from stillroom.train import engine
from stillroom.train.config import TrainConfig
from stillroom.train.ema import Ema
from stillroom.train.run import train_student
from tests.storage.stores import web

Settings = Callable[..., TrainConfig]
Maker = Callable[..., Path]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, npt.NDArray[np.float32]]:
    return load_file(out / "model.safetensors")


def assert_same_bytes(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_saves_memory_or_reads_ahead_changes_nothing(settings: Settings, cache: Path, tmp_path: Path) -> None:
    """Blocks computed again, a loss from hidden states, workers that read: bit for bit or to the rounding of the sums."""
    plain = settings(cache=cache, out=tmp_path / "plain", steps=6)
    train_student(plain)
    entered: list[int] = []
    again = settings(cache=cache, out=tmp_path / "again", steps=6, gradient_checkpointing=True)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: entered.append(1) if type(module).__name__ == "LlamaAttention" else None
    )
    train_student(again)
    handle.remove()
    assert len(entered) == 6 * 2 * 2  # steps, blocks, forward and once more
    assert_same_bytes(plain.out, again.out)
    workers = settings(cache=cache, out=tmp_path / "workers", steps=6, loader_workers=1)
    train_student(workers)
    assert_same_bytes(plain.out, workers.out)
    fused = settings(cache=cache, out=tmp_path / "fused", steps=6, head="fused")
    train_student(fused)
    for a, b in zip(metrics(plain.out), metrics(fused.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert 0 <= metrics(fused.out)[-1]["data_wait"] < 1


def test_the_average_is_the_recursion_and_is_saved_as_a_student(
    settings: Settings, cache: Path, tmp_path: Path
) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema, by_hand = Ema(model, 0.5), 1.0
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * step
    assert float(ema.average["weight"]) == pytest.approx(by_hand, rel=1e-6)

    config = settings(cache=cache, ema=0.9, steps=8, save_every=3)

    def kill(done: int, total: int, metrics: dict[str, Any]) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_student(config, on_progress=kill)
    train_student(config)
    whole = settings(cache=cache, ema=0.9, steps=8, out=tmp_path / "whole")
    train_student(whole)
    assert_same_bytes(config.out, whole.out)
    assert_same_bytes(config.out / "ema", whole.out / "ema")
    from transformers import AutoModelForCausalLM

    average = AutoModelForCausalLM.from_pretrained(config.out / "ema").state_dict()
    raw = weights(config.out)
    assert any(not np.array_equal(raw[name], average[name].numpy()) for name in raw)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_lora_trains_factors_and_saves_a_plain_student(
    settings: Settings, cache: Path, save_model: Maker, tmp_path: Path
) -> None:
    start = save_model(tmp_path / "start", seed=3)
    config = settings(
        cache=cache, student=str(start), lora_rank=4, lora_targets="q_proj,down_proj", steps=6, save_every=4
    )
    train_student(config)
    logged = metrics(config.out)
    assert logged[-1]["loss"] < logged[0]["loss"]
    before, after = weights(start), weights(config.out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    for name in changed:
        assert np.linalg.matrix_rank(after[name] - before[name], tol=1e-5) <= 4
    held = load_file(config.out / "checkpoint-4" / "model.safetensors")
    assert all("lora_" in name for name in held)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(16)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(config.out)(tokens).logits
        beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), config.out / "adapter")
        assert torch.allclose(beside(tokens).logits, merged, atol=1e-4)
    assert train_student(config).already_done


def test_a_student_without_attention(settings: Settings, cache: Path, tmp_path: Path) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2)
    config.save_pretrained(tmp_path / "mamba")
    found = []
    for head in ("logits", "fused"):
        made = settings(cache=cache, student=str(tmp_path / "mamba"), out=tmp_path / head, head=head, steps=5)
        train_student(made)
        found.append([m["loss"] for m in metrics(made.out)])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0][-1] < found[0][0]


def test_a_tracker_gets_what_the_log_gets(settings: Settings, cache: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(cache=cache, steps=3, report_to="tensorboard")
    train_student(config)
    (file,) = config.out.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name in ("loss", "kd", "tokens_per_s"):
        told = [event.value for event in events.Scalars(f"train/{name}")]
        assert told == pytest.approx([m[name] for m in metrics(config.out)], rel=1e-6)


def test_no_secret_is_written(settings: Settings, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_planted")
    with web(cache) as url:
        config = settings(
            cache=url.replace("://", "://user:planted@"), cache_dir=tmp_path / "copies", steps=2, save_every=1
        )
        train_student(config)
    for path in config.out.rglob("*"):
        assert not path.is_file() or b"planted" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(parallel="fsdp"), "fsdp with one process"),
        (dict(lora_rank=2), "configuration but no weights"),
        (dict(lora_alpha=2.0), "without a rank"),
        (dict(report_to="wandb"), "which is not installed: pip install wandb"),
    ],
)
def test_settings_that_can_not_be_met(
    settings: Settings, cache: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.TRACKERS, "wandb", ("no_such_module",))
    config = settings(cache=cache, **changes)
    with pytest.raises(InputError, match=said) as raised:
        train_student(config)
    assert "\n" not in str(raised.value)
    assert not config.out.exists()


def test_lora_targets_that_are_not_there(settings: Settings, cache: Path, save_model: Maker, tmp_path: Path) -> None:
    config = settings(cache=cache, student=str(save_model(tmp_path / "s")), lora_rank=2, lora_targets="nowhere")
    with pytest.raises(InputError, match="lora_targets came as nowhere"):
        train_student(config)
    assert not config.out.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_blocks_give_the_same_losses(settings: Settings, cache: Path, tmp_path: Path) -> None:
    runs = [dict(), dict(compile=True), dict(compile=True, gradient_checkpointing=True, head="fused")]
    found = []
    for number, changes in enumerate(runs):
        config = settings(cache=cache, out=tmp_path / str(number), steps=6, **changes)
        train_student(config)
        found.append([m["loss"] for m in metrics(config.out)])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] == pytest.approx(found[2], abs=1e-4)
