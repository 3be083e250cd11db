"""A batch on its way from a loader's worker."""

from __future__ import annotations

import gc
import os

import torch
from torch.utils.data import DataLoader, Dataset

from stillroom.kernels.targets import SparseTargets
from stillroom.train.batch import Batch
from stillroom.train.data import as_is


def make_batch(number: int, targets: bool, logp: bool) -> Batch:
    generator = torch.Generator().manual_seed(number)
    tokens_BL = torch.randint(0, 100, (3, 5), generator=generator)
    offsets = torch.cat([torch.zeros(1), torch.randint(0, 4, (15,), generator=generator)]).cumsum(0).to(torch.int64)
    entries = int(offsets[-1])
    row, entry = torch.rand(15, generator=generator), torch.rand(entries, generator=generator)
    some = SparseTargets(offsets, torch.arange(entries).int(), entry, row.log(), row, entry.log() if logp else None)
    return Batch(tokens_BL, tokens_BL.roll(1), tokens_BL > 50, some if targets else None)


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.tokens_BL, other.tokens_BL), (one.labels_BL, other.labels_BL), (one.mask_BL, other.mask_BL)]
    if one.targets is not None and other.targets is not None:
        names = ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
        pairs += [(getattr(one.targets, name), getattr(other.targets, name)) for name in names]
    elif one.targets is not other.targets:
        return False
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


class Batches(Dataset[Batch]):
    """Batches made where they are asked for; index 7 holds one without an entry."""

    def __len__(self) -> int:
        return 12

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = make_batch(indices[0], targets=indices[0] % 3 > 0, logp=indices[0] % 2 > 0)
        if indices[0] == 7 and batch.targets is not None:
            none = torch.zeros(0)
            offsets = torch.zeros(16, dtype=torch.int64)
            empty = SparseTargets(offsets, none.int(), none, batch.targets.label_logp, batch.targets.entropy)
            return Batch(batch.tokens_BL, batch.labels_BL, batch.mask_BL, empty)
        return batch


def test_a_worker_s_batches_are_those_read_here():
    loader = DataLoader(Batches(), batch_size=1, num_workers=2, collate_fn=as_is)
    for number, came in enumerate(loader):
        assert same(came, Batches().__getitems__([number])), number
        came.tokens_BL.add_(1)  # it is the parent's own


def test_it_travels_in_one_piece_and_leaves_no_file_open():
    before = len(os.listdir("/proc/self/fd"))
    kept = list(DataLoader(Batches(), batch_size=1, num_workers=1, collate_fn=as_is))
    assert len(os.listdir("/proc/self/fd")) - before <= len(kept) + 4  # a map keeps a descriptor of its own
    assert len({tensor.untyped_storage().data_ptr() for tensor in (kept[1].tokens_BL, kept[1].targets.ids)}) == 1
    del kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before <= 4
