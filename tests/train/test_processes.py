"""Several processes are one run: the same losses, the same batches, one end; DDP and FSDP2 over gloo."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillroom.storage.cache import open_cache
from stillroom.train.config import TrainConfig
from stillroom.train.data import CacheDataset, OrderSampler, order_of
from stillroom.train.run import train_student
from tests.train import fleet

Settings = Callable[..., TrainConfig]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [m["loss"] for m in metrics(out)]


def base(cache: Path, student: Path, out: Path, **changes: Any) -> dict[str, Any]:
    common = dict(
        cache=cache, student=student, out=out, batch_size=8, lr=2e-3, dtype="float32", save_every=0, log_every=1
    )
    return {**common, **changes}


def test_two_processes_give_the_losses_of_one(settings: Settings, cache: Path, student: Path, tmp_path: Path) -> None:
    """Unequal parts: 7 sequences; the first process alone writes and speaks."""
    found = fleet.run(2, base(cache, student, tmp_path / "two", batch_size=7, steps=5, alpha=0.2, head="fused"))
    assert [status for status, _, _ in found] == [0, 0], found
    assert json.loads(found[0][1])["steps"] == 5
    assert found[1][1] == ""
    one = settings(cache=cache, batch_size=7, steps=5, alpha=0.2, lr=2e-3)
    train_student(one)
    assert losses(tmp_path / "two") == pytest.approx(losses(one.out), abs=1e-5)
    assert [m["grad_norm"] for m in metrics(tmp_path / "two")] == pytest.approx(
        [m["grad_norm"] for m in metrics(one.out)], rel=1e-4
    )
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in one.out.iterdir()}


@pytest.mark.slow
def test_own_loop_trainer_ddp_and_fsdp_agree(settings: Settings, cache: Path, student: Path, tmp_path: Path) -> None:
    """20 steps each, losses to 1e-5."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import stillroom

    steps, lr = 20, 2e-3
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == flat] for flat in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
    )
    own = []
    for batch in stillroom.Stream(stillroom.open_cache(cache), batch_size=8, seed=0, steps=steps):
        logits_NV = model(input_ids=batch.tokens_BL).logits.flatten(0, 1)
        loss = stillroom.sparse_kd_loss(logits_NV, batch.targets, batch.labels_BL.flatten(), alpha=0.2).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        own.append(loss.item())

    common = dict(steps=steps, lr=lr, alpha=0.2, schedule="constant", warmup=0)
    one = settings(cache=cache, **common)
    train_student(one)
    assert losses(one.out) == pytest.approx(own, abs=1e-5)
    for name, changes in {
        "ddp": dict(grad_accumulation=2),
        "fsdp": dict(parallel="fsdp"),
        "fsdp-fused": dict(parallel="fsdp", head="fused", gradient_checkpointing=True, loader_workers=1),
    }.items():
        found = fleet.run(2, base(cache, student, tmp_path / name, **common, **changes))
        assert [status for status, _, _ in found] == [0, 0], found
        assert losses(tmp_path / name) == pytest.approx(own, abs=1e-5), name
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for key, weight in AutoModelForCausalLM.from_pretrained(one.out).state_dict().items():
            assert torch.allclose(opened.state_dict()[key], weight, atol=1e-4), key


RECORDED = (
    """
import json, os
from stillroom.train.data import CacheDataset
read = CacheDataset.__getitems__
def recorded(self, indices):
    with open(os.environ["READ_LOG"] + "." + os.environ["RANK"], "a") as file:
        file.write(json.dumps([int(i) for i in indices]) + "\\n")
    return read(self, indices)
CacheDataset.__getitems__ = recorded
"""
    + fleet.MAIN
)


@pytest.mark.slow
def test_stopped_anywhere_and_gone_on_with_other_processes(cache: Path, student: Path, tmp_path: Path) -> None:
    """1 -> 2 (FSDP2) -> 2 (DDP, two parts) -> 1; SIGTERM to one process ends all with 143 and a checkpoint.

    The global batches are those of the order, each step once; Muon's and the average's state go along.
    """
    steps, out = 60, tmp_path / "out"
    common = dict(steps=steps, optimizer="muon", lr=0.005, ema=0.9)
    stages: list[tuple[int, int | None, dict[str, Any]]] = [
        (1, 6, {}),
        (2, 20, dict(parallel="fsdp", head="fused")),
        (2, 35, dict(grad_accumulation=2)),
        (1, None, {}),
    ]
    seen: list[set[int]] = []
    for number, (processes, at, changes) in enumerate(stages):
        log = tmp_path / f"read-{number}"
        processes_of = fleet.start(
            processes, base(cache, student, out, **common, **changes), code=RECORDED, READ_LOG=str(log)
        )
        if at is not None:
            fleet.signal_at(processes_of, out, at, signal.SIGTERM, only=processes - 1)
        found = fleet.finish(processes_of)
        assert [status for status, _, _ in found] == [143 if at else 0] * processes, found
        parts = int(changes.get("grad_accumulation", 1))
        read = [
            [json.loads(line) for line in Path(f"{log}.{rank}").read_text().splitlines()] for rank in range(processes)
        ]
        seen += [
            {i for mine in read for part in mine[step * parts : (step + 1) * parts] for i in part}
            for step in range(len(read[0]) // parts)
        ]
        if at is not None:
            last = max(int(p.name.removeprefix("checkpoint-")) for p in out.glob("checkpoint-*"))
            assert last == len(seen) == len(metrics(out)) >= at
    source = CacheDataset(open_cache(cache))
    order = OrderSampler(order_of(source, seed=0), batch_size=8, steps=steps)
    assert seen == [set(order.step(step).tolist()) for step in range(steps)]
    assert [m["step"] for m in metrics(out)] == list(range(1, steps + 1))

    whole = fleet.run(1, base(cache, student, tmp_path / "whole", **common))
    assert whole[0][0] == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=2e-3)
    from safetensors.numpy import load_file

    for part in ("", "ema"):
        ours, theirs = (load_file(folder / part / "model.safetensors") for folder in (out, tmp_path / "whole"))
        assert all(np.allclose(ours[name], theirs[name], atol=2e-2) for name in theirs)


FULL_DISK_OF_THE_FIRST = (
    """
import os, resource
if os.environ["RANK"] == "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
"""
    + fleet.MAIN
)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_end_with_one_that_can_not_go_on(
    cache: Path, student: Path, tmp_path: Path, parallel: str
) -> None:
    full = base(cache, student, tmp_path / "full", steps=6, save_every=3, parallel=parallel)
    found = fleet.run(2, full, code=FULL_DISK_OF_THE_FIRST)
    assert [status for status, _, _ in found] == [2, 2], found
    assert all("checkpoint-3 could not be written" in err and "Traceback" not in err for _, _, err in found)
    wild = base(cache, student, tmp_path / "wild", steps=9, lr=1e30, warmup=0, schedule="constant", parallel=parallel)
    found = fleet.run(2, wild)
    assert [status for status, _, _ in found] == [2, 2], found
    assert all("the loss became nan" in err and "Traceback" not in err for _, _, err in found)
