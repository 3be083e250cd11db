"""The disk takes no more while a checkpoint or the student is written: one sentence, nothing half, and with room it goes on."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from stillroom.storage.errors import InputError
from stillroom.train.config import TrainConfig
from stillroom.train.folder import damage
from stillroom.train.run import train_student

Settings = Callable[..., TrainConfig]


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Set the operating system's limit of a file's size; Python turns its signal into an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "the student"])
def test_a_full_disk(settings: Settings, cache: Path, tmp_path: Path, file: str, limit: Callable[[int], None]) -> None:
    whole = settings(cache=cache, steps=9, save_every=3, out=tmp_path / "whole")
    train_student(whole)
    in_checkpoint = file != "the student"
    config = settings(cache=cache, steps=9, save_every=3 if in_checkpoint else 0)
    size = (whole.out / "checkpoint-6" / (file if in_checkpoint else "model.safetensors")).stat().st_size

    def fill(done: int, total: int, metrics: dict[str, Any]) -> None:
        if done == (4 if in_checkpoint else 9):
            limit(size - 1)

    said = (
        "checkpoint-6 could not be written .* go on from checkpoint-3"
        if in_checkpoint
        else "the student could not be written"
    )
    with pytest.raises(InputError, match=said) as raised:
        train_student(config, on_progress=fill)
    assert "\n" not in str(raised.value)
    assert [p.name for p in sorted(config.out.glob("*checkpoint*"))] == (["checkpoint-3"] if in_checkpoint else [])
    if in_checkpoint:
        assert damage(config.out / "checkpoint-3") is None
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    steps: list[int] = []
    train_student(config, on_progress=lambda done, total, metrics: steps.append(done))
    assert steps[0] == (4 if in_checkpoint else 1)
    ours, theirs = (load_file(out / "model.safetensors") for out in (config.out, whole.out))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
