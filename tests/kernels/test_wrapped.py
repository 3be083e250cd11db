"""The fused head in a module wrapped by DDP and FSDP2: one step on two processes is the step of one on the joint batch.

Run as a program this file is one of the ranks (gloo, loopback).

Shapes: `N` rows, `V` vocabulary, `D` width, `E` entries.
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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stillroom.kernels.fused_linear import fused_linear_sparse_kd
from stillroom.kernels.targets import SparseTargets

RANKS = 2
VOCABULARY, WIDTH, KEPT = 50, 12, 4
ROWS_OF_RANK = (9, 14)  # ragged, so that an average of the ranks' means would show
WRAPPERS = ("ddp", "fsdp", "fsdp_recompute")


class Student(nn.Module):
    """A model whose forward ends in its loss: inside the wrapper the head's weight is a plain, whole tensor."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.recompute = recompute

    def forward(self, tokens_N: Tensor, targets: SparseTargets, labels_N: Tensor, row_weights_N: Tensor) -> Tensor:
        hidden_ND = self.body(self.embedding(tokens_N))
        return fused_linear_sparse_kd(
            hidden_ND,
            self.head.weight,
            targets,
            labels_N,
            bias_V=self.head.bias,
            alpha=0.3,
            row_weights_N=row_weights_N,
            chunk_rows=4,
            recompute=self.recompute,
        ).loss  # a tensor: wrappers look for tensors to hook into, not into dataclasses


def student(recompute: bool = False) -> Student:
    torch.manual_seed(0)
    return Student(recompute).double()


def batch(rows: slice) -> tuple[Tensor, SparseTargets, Tensor, Tensor]:
    """These rows of the joint batch; the weights of all its labelled rows sum to 1."""
    generator = torch.Generator().manual_seed(1)
    total = sum(ROWS_OF_RANK)
    tokens_N, labels_N = torch.randint(0, VOCABULARY, (2, total), generator=generator)
    labels_N[::5] = -100
    ids_NK = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:KEPT] for _ in range(total)])
    weights_NK = torch.rand(total, KEPT, generator=generator)
    weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
    labelled_N = (labels_N != -100).double()
    row_weights_N = labelled_N / labelled_N.sum()
    count = len(tokens_N[rows])
    targets = SparseTargets(
        torch.arange(count + 1) * KEPT, ids_NK[rows].flatten().int(), weights_NK[rows].flatten(), torch.zeros(count),
        torch.zeros(count),
    )  # fmt: skip
    return tokens_N[rows], targets, labels_N[rows], row_weights_N[rows]


def step(model: nn.Module, rows: slice, share: float) -> Tensor:
    """One step of SGD; `share` makes up for wrappers that average the ranks' gradients."""
    tokens_N, targets, labels_N, row_weights_N = batch(rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss: Tensor = model(tokens_N, targets, labels_N, row_weights_N * share)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach() / share


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    start = sum(ROWS_OF_RANK[:rank])
    rows = slice(start, start + ROWS_OF_RANK[rank])
    found: dict[str, object] = {}
    for wrapper in WRAPPERS:
        model: nn.Module = student(recompute=wrapper == "fsdp_recompute")
        if wrapper == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model.body, mesh=mesh)
            fully_shard(model, mesh=mesh, reshard_after_forward=wrapper == "fsdp_recompute")
        loss = step(model, rows, share=RANKS)
        dist.all_reduce(loss)
        whole = {
            n.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.named_parameters()
        }
        found[wrapper] = {"loss": loss, **{n: p.detach().clone() for n, p in whole.items()}}
    found["outside"] = refusal(model)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def refusal(model: nn.Module) -> str:
    """What is said about the weight of an FSDP module outside its forward."""
    _, targets, labels_N, _ = batch(slice(0, 3))
    assert isinstance(model, Student)
    try:
        fused_linear_sparse_kd(torch.zeros(3, WIDTH, dtype=torch.float64), model.head.weight, targets, labels_N)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
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


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_step_equals_one_process_on_the_joint_batch(
    wrapper: str, by_rank: list[dict[str, dict[str, Tensor]]]
) -> None:
    """Loss and every parameter after the step, on both ranks."""
    model = student()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    loss = step(model, slice(None), share=1.0)
    for found in by_rank:
        assert float(found[wrapper]["loss"]) == pytest.approx(float(loss), rel=1e-12)
        for name, parameter in model.named_parameters():
            assert torch.allclose(found[wrapper][name], parameter, rtol=1e-11, atol=1e-13), name
            assert not torch.equal(parameter, before[name]), f"{name} was not trained"


def test_a_sharded_weight_is_refused_by_name(by_rank: list[dict[str, dict[str, Tensor]]]) -> None:
    for found in by_rank:
        assert str(found["outside"]).startswith("`weight_VD` came as a DTensor")
        assert "full_tensor()" in str(found["outside"])


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
