from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stillroom.storage.cache import open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.stream import StreamOrder
from stillroom.train.data import CacheDataset, OrderSampler, TokenDataset, as_is, order_of


def test_a_cache_batch_holds_tokens_labels_and_targets_of_its_rows(cache: Path) -> None:
    opened = open_cache(cache)
    batch = CacheDataset(opened).__getitems__([3, 17])
    for place, index in enumerate([3, 17]):
        tokens, targets = opened[index]
        assert torch.equal(batch.tokens_BL[place], torch.from_numpy(tokens[:-1].astype(np.int64)))
        assert torch.equal(batch.labels_BL[place], torch.from_numpy(tokens[1:].astype(np.int64)))
        assert batch.targets is not None
        lo, hi = (int(batch.targets.offsets[(place + k) * opened.manifest.packing.seq_len]) for k in (0, 1))
        assert np.array_equal(batch.targets.ids[lo:hi].numpy(), targets.ids)
        assert np.array_equal(batch.targets.weights[lo:hi].numpy(), targets.weights)
    assert batch.mask_BL.all()


def test_tokens_only_from_a_cache(cache: Path) -> None:
    opened = open_cache(cache)
    whole, bare = (CacheDataset(opened, with_targets=w)[5] for w in (True, False))
    assert bare.targets is None
    assert torch.equal(whole.tokens_BL, bare.tokens_BL)
    assert torch.equal(whole.labels_BL, bare.labels_BL)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_fetches_whole_batches(cache: Path, workers: int) -> None:
    source = CacheDataset(open_cache(cache))
    order = OrderSampler(order_of(source, seed=1), batch_size=8, steps=3)
    loader = DataLoader(source, batch_sampler=order, collate_fn=as_is, num_workers=workers)
    batches = list(loader)
    assert [b.tokens_BL.shape for b in batches] == [(8, source.seq_len)] * 3
    assert torch.equal(batches[2].tokens_BL, source.__getitems__(order.step(2).tolist()).tokens_BL)


def test_every_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    order = OrderSampler(StreamOrder([20], seed=3), batch_size=5, steps=8)
    drawn = np.concatenate([order.step(k) for k in range(8)])
    first, second = drawn[:20], drawn[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)
    assert list(first) != list(
        np.concatenate([OrderSampler(StreamOrder([20], seed=4), batch_size=5, steps=4).step(k) for k in range(4)])
    )


@pytest.mark.parametrize(("parts", "ranks"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_parts_and_ranks_cut_a_step_but_do_not_change_it(parts: int, ranks: int) -> None:
    whole = OrderSampler(StreamOrder([13], seed=0), batch_size=8, steps=4)
    cuts = [
        list(OrderSampler(StreamOrder([13], seed=0), batch_size=8, steps=4, parts=parts, rank=r, ranks=ranks))
        for r in range(ranks)
    ]
    for step in range(4):
        held = [i for mine in cuts for part in mine[step * parts : (step + 1) * parts] for i in part]
        assert sorted(held) == sorted(whole.step(step).tolist())


def test_a_resumed_order_goes_on_where_it_was() -> None:
    whole = list(OrderSampler(StreamOrder([13], seed=0), batch_size=4, steps=9, parts=2))
    resumed = OrderSampler(StreamOrder([13], seed=0), batch_size=4, steps=9, parts=2, first_step=5)
    assert list(resumed) == whole[10:]
    assert len(resumed) == len(whole)  # the Trainer counts the run by it


def test_rows_without_targets_leave_the_loss(make_cache: Callable[..., Path]) -> None:
    batch = CacheDataset(open_cache(make_cache(hole=True)))[0]
    assert not batch.mask_BL[0, 4]
    assert batch.labels_BL[0, 4] == -100
    assert int(batch.mask_BL.sum()) == batch.mask_BL.numel() - 1


@pytest.mark.parametrize("tokens", [np.zeros((3,), np.int64), np.zeros((0, 5), np.int64), np.zeros((3, 5), np.float32)])
def test_tokens_of_another_shape_are_refused(tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match="wanted integers"):
        TokenDataset(tokens)


def test_the_fingerprint_is_of_the_content(cache: Path) -> None:
    tokens = np.arange(30).reshape(5, 6)
    assert TokenDataset(tokens).fingerprint == TokenDataset(tokens.astype(np.uint16)).fingerprint
    assert TokenDataset(tokens).fingerprint != TokenDataset(tokens[:4]).fingerprint
    assert TokenDataset(tokens).fingerprint != TokenDataset(tokens.reshape(6, 5)).fingerprint
    assert len(CacheDataset(open_cache(cache)).fingerprint) == 64
