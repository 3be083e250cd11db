from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stillroom.train.optim import CombinedOptimizer, Float32Muon, make_optimizer, rate_multiplier


def _model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_muon_in_float32_is_torchs_up_to_bfloat16(shape: tuple[int, int]) -> None:
    """Three steps; torch iterates in bfloat16 (8 bits), so the two directions agree to a few parts in a hundred."""
    torch.manual_seed(0)
    start = torch.randn(shape)
    ends = []
    for kind in (torch.optim.Muon, Float32Muon):
        weight = nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.05, weight_decay=0.1, momentum=0.95)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            weight.grad = torch.randn(shape, generator=generator)
            optimizer.step()
        ends.append(weight.detach() - start)
    assert (ends[0] - ends[1]).norm() / ends[0].norm() < 0.03
    assert math.isclose(ends[0].norm(), ends[1].norm(), rel_tol=0.01)


def test_muon_takes_the_hidden_matrices_and_nothing_else() -> None:
    model = _model()
    optimizer = make_optimizer(model, name="muon", lr=0.02, embedding_lr=0.004, weight_decay=0.05)
    assert isinstance(optimizer, CombinedOptimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    held = [{names[id(p)] for g in part.param_groups for p in g["params"]} for part in optimizer.optimizers]
    assert {n.rsplit(".", 2)[-2] for n in held[0]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= held[1]
    assert held[0] | held[1] == set(names.values())
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.004]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_and_loaded_optimizers_go_on_alike(name: str) -> None:
    first = _model()
    optimizer = make_optimizer(first, name=name, lr=0.01, embedding_lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]
    _step(first, optimizer, 0)
    second = copy.deepcopy(first)
    loaded = make_optimizer(second, name=name, lr=0.5, embedding_lr=0.5, weight_decay=0.0)  # type: ignore[arg-type]
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, one in ((first, optimizer), (second, loaded)):
        _step(model, one, 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_vectors_do_not_decay() -> None:
    optimizer = make_optimizer(_model(), name="adamw", lr=1e-3, embedding_lr=1.0, weight_decay=0.1)
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in optimizer.param_groups] == [
        (0.1, {2}),
        (0.0, {1}),
    ]


def test_rates() -> None:
    def rates(schedule: str, warmup: float, decay: float = 0.5) -> list[float]:
        f = rate_multiplier(schedule, steps=10, warmup=warmup, decay=decay)  # type: ignore[arg-type]
        return [round(f(k), 6) for k in range(11)]

    assert rates("constant", 0.2) == [0.5] + [1.0] * 10
    assert rates("linear", 0.2) == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert rates("wsd", 0.0) == [1.0] * 6 + [0.8, 0.6, 0.4, 0.2, 0.0]
    assert rates("cosine", 0.0)[5] == 0.5
    assert rates("cosine", 0.0)[10] == 0.0
