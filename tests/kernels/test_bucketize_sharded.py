"""`bucketize_sharded` on real processes (gloo, loopback) against one process; run as a program this file is one of the ranks.

Shapes: `N` rows, `V` vocabulary, `E` entries, `T` temperatures.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stillroom.kernels.bucketize import Buckets, bucketize, bucketize_sharded

RANKS = 4
TEMPERATURES = (1.0, 2.5)
# ranks of the group -> where each one's slice of the vocabulary begins; the last one is ragged and holds padded columns
SHARDS = {2: (0, 50, 83), 4: (0, 24, 48, 72, 83)}
PADDED_FROM = 80


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows with: labels in every shard, a support that fills the first shard, one that fills the vocabulary, and none."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(6, 83, generator=generator, dtype=torch.float64) * 3
    logits_NV[:, PADDED_FROM:] = -torch.inf
    supports = [torch.randperm(80, generator=generator)[:k] for k in (5, 0, 12, 1)]
    supports += [torch.arange(50), torch.arange(83)]
    ids = torch.cat(supports).int()
    offsets = torch.tensor([0, *torch.tensor([len(s) for s in supports]).cumsum(0).tolist()])
    return logits_NV, offsets, ids, torch.tensor([int(ids[0]), 79, 30, -100, 55, 0])


def total(b: Buckets) -> Tensor:
    """A scalar in which every number of every row has its own upstream gradient."""
    generator = torch.Generator().manual_seed(1)
    loss = b.support_E.new_zeros(())
    for part in (b.support_E, b.label_N, b.tail_NT):
        if part is not None:
            weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            loss = loss + (weight * torch.where(part.isfinite(), part, 0.0)).sum()
    return loss


def results(b: Buckets, z: Tensor) -> dict[str, Tensor]:
    (gradient,) = torch.autograd.grad(total(b), z)
    found = dict(support=b.support_E.detach(), tail=b.tail_NT.detach(), gradient=gradient)
    return found if b.label_N is None else {**found, "label": b.label_N.detach()}


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    logits_NV, offsets, ids, labels_N = case()
    groups = {2: dist.new_group([0, 1]), 4: None}
    found = {}
    for size, group in groups.items():
        if rank >= size:
            continue
        start, stop = SHARDS[size][rank : rank + 2]
        for labels in (labels_N, None):
            z = logits_NV[:, start:stop].clone().requires_grad_()
            b = bucketize_sharded(z, offsets, ids, labels, group, start, TEMPERATURES)
            found[size, labels is not None] = results(b, z)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, bool], dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment) for rank in range(RANKS)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * RANKS
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("size", SHARDS)
def test_equals_one_process(
    size: int, labelled: bool, by_rank: list[dict[tuple[int, bool], dict[str, Tensor]]]
) -> None:
    """Values on every rank, and the gradients of the slices side by side."""
    logits_NV, offsets, ids, labels_N = case()
    z = logits_NV.requires_grad_()
    wanted = results(bucketize(z, offsets, ids, labels_N if labelled else None, TEMPERATURES), z)
    shards = [found[size, labelled] for found in by_rank[:size]]
    assert set(shards[0]) == set(wanted)
    for name in set(wanted) - {"gradient"}:
        for shard in shards:
            assert torch.allclose(shard[name], wanted[name], rtol=1e-13, atol=1e-13), name
            assert torch.equal(shard[name], shards[0][name]), f"{name} differs between ranks"
    gradient = torch.cat([shard["gradient"] for shard in shards], 1)
    assert torch.allclose(gradient, wanted["gradient"], rtol=1e-12, atol=1e-14)
    assert bool((gradient[:5, PADDED_FROM:] == 0).all())


def test_the_case_has_empty_tails(by_rank: list[dict[tuple[int, bool], dict[str, Tensor]]]) -> None:
    """Row 4 keeps all of the first slice of two, row 5 all ids there are: an empty tail on one rank, and on all."""
    _, offsets, ids, _ = case()
    assert set(range(SHARDS[2][1])) <= set(ids[offsets[4] : offsets[5]].tolist())
    assert torch.isinf(by_rank[0][4, True]["tail"]).all(1).tolist() == [False] * 5 + [True]


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
