"""`Stream` and the sampler: the same global batches for any ranks and workers, exact resumption, any loop."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import InputError
from stillroom.train.data import CacheDataset, OrderSampler, TokenDataset, as_is, order_of
from stillroom.train.run import train_student
from stillroom.train.stream import Stream

DOCS = Path(__file__).resolve().parents[2] / "docs" / "streaming.md"


def tokens_of(stream: Stream) -> list[torch.Tensor]:
    return [batch.tokens_BL for batch in stream]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_ranks_and_workers_give_the_same_global_batches(cache: Path, workers: int) -> None:
    opened = open_cache(cache)
    order = order_of(CacheDataset(opened), seed=3, window=2)
    expected = [opened.read(order.sequences(8 * g, 8 * g + 8)).tokens[:, :-1].astype(np.int64) for g in range(7)]
    for ranks in (1, 2, 4) if workers == 0 else (1, 2):
        parts = [
            tokens_of(Stream(opened, batch_size=8, seed=3, window=2, steps=7, rank=rank, ranks=ranks, workers=workers))
            for rank in range(ranks)
        ]
        for g, whole in enumerate(expected):
            np.testing.assert_array_equal(torch.cat([part[g] for part in parts]).numpy(), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_taken_in_the_loop_is_that_after_the_batch_in_hand(cache: Path, workers: int) -> None:
    opened = open_cache(cache)
    whole = tokens_of(Stream(opened, batch_size=8, seed=0, window=2, steps=9))
    stream = Stream(opened, batch_size=8, seed=0, window=2, steps=9, workers=workers)
    states = []
    for done, _ in enumerate(itertools.islice(stream, 3), 1):  # workers are ahead of this loop
        states.append(json.loads(json.dumps(stream.state_dict())))
        assert stream.position == 8 * done
    resumed = Stream(opened, batch_size=8, seed=0, window=2, steps=9)
    for done, state in enumerate(states, 1):
        resumed.load_state_dict(state)
        assert len(resumed) == 9 - done
        for ours, theirs in zip(tokens_of(resumed), whole[done:], strict=True):
            assert torch.equal(ours, theirs)


def test_resuming_with_another_batch_size_goes_on_at_the_same_sequence(cache: Path) -> None:
    opened = open_cache(cache)
    whole = torch.cat(tokens_of(Stream(opened, batch_size=4, seed=0, steps=24)))
    stream = Stream(opened, batch_size=4, seed=0)
    list(itertools.islice(stream, 5))
    other = Stream(opened, batch_size=7, seed=0, steps=10)
    other.load_state_dict(stream.state_dict())
    assert torch.equal(torch.cat(tokens_of(other)), whole[20 : 20 + 7 * 7])  # until 10 batches of 7 are through


def test_iterating_again_goes_on(cache: Path) -> None:
    stream = Stream(open_cache(cache), batch_size=8, seed=0, steps=4)
    first = [batch.tokens_BL for batch in itertools.islice(stream, 1)]
    assert len(first + tokens_of(stream)) == 4
    assert tokens_of(stream) == []


def test_it_reads_no_random_number_of_the_loop(cache: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    tokens_of(Stream(open_cache(cache), batch_size=8, seed=0, steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_another_cache_is_refused(cache: Path, make_cache: Any, tokens_SL1: np.ndarray) -> None:
    stream = Stream(open_cache(cache), batch_size=8, seed=0)
    with pytest.raises(InputError, match="manifest"):
        Stream(open_cache(make_cache(seed=5)), batch_size=8, seed=0).load_state_dict(stream.state_dict())
    with pytest.raises(InputError, match="window"):
        Stream(TokenDataset(tokens_SL1), batch_size=8, seed=0).load_state_dict(stream.state_dict())
    with pytest.raises(InputError, match="rank came as 2 of 2"):
        Stream(open_cache(cache), batch_size=8, seed=0, rank=2, ranks=2)
    with pytest.raises(InputError, match="one each at least"):
        Stream(open_cache(cache), batch_size=1, seed=0, ranks=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_remote_cache_streams_through_a_loader(cache: Path, tmp_path: Path, workers: int) -> None:
    """One worker process: spawned, so it opens everything anew."""
    opened = open_cache(cache)
    largest = max(opened.record(shard).size_bytes for shard in opened.shards)
    remote = open_cache(f"file://{cache}", cache_dir=tmp_path, cache_bytes=2 * largest)
    stream = Stream(remote, batch_size=8, seed=0, steps=6, workers=workers)
    assert stream.order.window == 1
    expected = Stream(opened, batch_size=8, seed=0, steps=6, window=1)
    for ours, theirs in zip(stream, expected, strict=True):
        assert torch.equal(ours.tokens_BL, theirs.tokens_BL)
        assert ours.targets is not None
        assert theirs.targets is not None
        assert torch.equal(ours.targets.ids, theirs.targets.ids)
        assert torch.equal(ours.targets.weights, theirs.targets.weights)


def test_a_student_from_a_remote_cache_is_the_one_from_the_disk(cache: Path, tmp_path: Path, settings: Any) -> None:
    here = train_student(settings(cache=cache, out=tmp_path / "here", steps=6, window=1))
    there = train_student(
        settings(cache=f"file://{cache}", cache_dir=tmp_path / "copies", out=tmp_path / "there", steps=6, window=1)
    )
    assert there.loss == here.loss
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "there")]
    assert weights[0] == weights[1]
    mixed = train_student(settings(cache=cache, out=tmp_path / "mixed", steps=6))
    assert mixed.loss != here.loss


def test_the_libraries_trainer_reads_in_our_order(cache: Path, tmp_path: Path, save_model: Any) -> None:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    source = CacheDataset(open_cache(cache))
    order = order_of(source, seed=0, window=2)
    seen: list[torch.Tensor] = []

    def collate(batch: Any) -> dict[str, torch.Tensor]:
        seen.append(batch.tokens_BL)
        return {"input_ids": batch.tokens_BL, "labels": batch.tokens_BL}

    class OurTrainer(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> DataLoader[Any]:
            sampler = OrderSampler(order, batch_size=4, steps=self.args.max_steps, follow=source.follow)
            return DataLoader(source, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    OurTrainer(model=model, args=arguments).train()
    expected = [source.__getitems__(order.sequences(4 * k, 4 * k + 4).tolist()).tokens_BL for k in range(3)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, expected, strict=True))
    assert as_is(source[0]).tokens_BL.shape == (1, source.seq_len)


def test_the_loop_in_the_documentation_runs_as_printed(
    cache: Path, tmp_path: Path, save_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r"<!-- bare loop -->\n```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert found
    code = found[1]
    assert code.count("\n") <= 20
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").symlink_to(cache)
    save_model(tmp_path / "student")
    first: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), first)
    assert first["stream"].position == 20 * 4
    second: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), second)  # finds its checkpoint, and that nothing is left to do
    assert second["stream"].position == 20 * 4
    assert "loss" not in second
