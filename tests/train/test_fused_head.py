"""The loss inside the student's forward: found heads, and the fused path against whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.kernels.fused_linear import peak_bytes, plan
from stillroom.storage.cache import open_cache
from stillroom.train.batch import Batch
from stillroom.train.data import CacheDataset
from stillroom.train.fused import Head, find_head, with_loss, without_loss
from stillroom.train.objective import Objective
from stillroom.train.schedule import Schedule
from tests.kernels.test_fused_linear_memory import Alive, small_blocks

COMMON: dict[str, Any] = dict(
    vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any], Head | None]] = {
    "tied": ("LlamaConfig", {**COMMON, "tie_word_embeddings": True}, Head()),
    "soft-capped": ("Gemma2Config", {**COMMON, "head_dim": 16, "final_logit_softcapping": 30.0}, Head(softcap=30.0)),
    "scaled": ("CohereConfig", {**COMMON, "logit_scale": 0.0625}, Head(scale=0.0625)),
    "divided": ("GraniteConfig", {**COMMON, "logits_scaling": 8.0}, Head(scale=0.125)),
    "state space": ("MambaConfig", dict(vocab_size=101, hidden_size=32, state_size=8, num_hidden_layers=1), Head()),
    "projected": (
        "OPTConfig",
        dict(vocab_size=101, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
             max_position_embeddings=16, word_embed_proj_dim=16),
        None,
    ),
}  # fmt: skip


def student(kind: str) -> Any:
    import transformers

    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))


def gradients(model: Any, head: Head | None, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, Any]]:
    with_loss(model, objective, head, torch.float32)
    loss, *_ = model(batch=batch, rows=float(batch.mask_BL.sum()), step=0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    without_loss(model)
    return loss.detach(), found


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_found_by_trying(kind: str) -> None:
    """Random weights' small logits hide a cap and a scale; the probe does not."""
    model = student(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert find_head(model) == KINDS[kind][2]
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["tied", "soft-capped", "scaled", "state space"])
def test_loss_and_every_gradient_are_those_of_the_logits(kind: str, cache: Path) -> None:
    """Vocabulary 101, of which 97 count. Error against float64 at most twice that of whole logits, and a rounding."""
    batch = CacheDataset(open_cache(cache)).__getitems__([0, 5, 9])
    objective = Objective(name="forward_kl", vocab_size=97, alpha=Schedule.constant(0.3))
    model = student(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)  # logits that are worth a cap
    head = find_head(model)
    assert head is not None
    pairs = {name: gradients(model, how, batch, objective) for name, how in (("logits", None), ("fused", head))}
    truth_loss, truth = gradients(model.double(), None, batch, objective)
    assert pairs["fused"][1].keys() == truth.keys()
    errors = {
        name: {"loss": abs(float(loss) - float(truth_loss)) / abs(float(truth_loss))}
        | {n: float((g.double() - truth[n]).norm() / truth[n].norm().clamp(min=1e-30)) for n, g in found.items()}
        for name, (loss, found) in pairs.items()
    }
    for name, error in errors["fused"].items():
        assert error <= 2 * errors["logits"][name] + 1e-6, name
    ends = model.get_output_embeddings().weight
    name = next(n for n, p in model.named_parameters() if p is ends)
    assert pairs["fused"][1][name][:97].norm() > 0
    if not model.config.tie_word_embeddings:
        assert not pairs["fused"][1][name][97:].any()


def test_no_logits_are_alive(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything made in forward and backward is watched: far below whole logits, and what the formula says for the head."""
    import transformers

    rows, vocabulary, width = 8 * 16, 4_000, 16
    monkeypatch.setattr(plan, "CHUNK_ROWS", 16)
    settings = {**COMMON, "vocab_size": vocabulary, "hidden_size": width, "tie_word_embeddings": False}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**settings))
    batch = CacheDataset(open_cache(cache)).__getitems__(list(range(8)))
    objective = Objective(name="forward_kl", vocab_size=vocabulary)
    peaks = {}
    for name, head in (("logits", None), ("fused", Head())):
        with_loss(model, objective, head, torch.float32)
        with small_blocks(), Alive() as alive:  # type: ignore[no-untyped-call]
            model(batch=batch, rows=128.0, step=0)[0].backward()
        peaks[name] = alive.peak
        without_loss(model)
        model.zero_grad()
    gradients = 2 * vocabulary * width * 4  # of embedding and head, as they are kept in the end
    body = rows * (64 * 12 + width * 40) * 4  # activations of the one block
    formula = peak_bytes(rows, vocabulary, width, torch.float32)
    assert peaks["fused"] <= formula + gradients + body
    assert peaks["logits"] >= rows * vocabulary * 4 > formula + body
