"""`sample_sharded` against `sample`, bit for bit: slices held by threads of this process, and by real processes (gloo).

Run as a program this file is one of the processes. Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

import datetime
import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.kernels.backend import interpreted
from stillroom.kernels.sample import KINDS, sample, sample_sharded, steps
from stillroom.kernels.sample.checks import Request
from stillroom.kernels.sample.ranks import Alone
from stillroom.kernels.sample.shares import TorchShare
from stillroom.kernels.targets import SparseTargets

NAMES = ("offsets", "ids", "weights", "logp", "label_logp", "entropy")
VOCABULARY = 301
CUTS = {1: (0, 301), 2: (0, 150, 301), 4: (0, 1, 98, 300, 301)}  # any alignment; slices of one id


def _rows() -> torch.Tensor:
    """Peaked, flat, tied, excluded: `[N, V]`."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(8, VOCABULARY, generator=generator) * torch.tensor([[8.0, 4, 2, 1, 0.1, 0, 3, 3]]).t()
    logits_NV[5, :7] = 1.0
    logits_NV[6, 98:] = -math.inf  # slices without anything
    logits_NV[7, :-1] = -math.inf
    return logits_NV


def _request(kind: str, rows: int, draws: int = 20) -> dict[str, Any]:
    extra = dict(exponent=0.8) if kind == "random" else dict(top_p=0.8) if kind == "top_p" else {}
    return dict(
        labels_N=torch.tensor([0, -100, 97, 98, 299, 300, 150, 0])[:rows], kind=kind, draws=draws, seed=(1 << 63) + 5,
        sequence_N=torch.arange(rows) * 0x1234567, row_N=torch.arange(rows) + (1 << 20), **extra,
    )  # fmt: skip


def _assert_same(a: SparseTargets, b: SparseTargets) -> None:
    for name in NAMES:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


class Together:
    """The ranks of a group as threads of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._slots: list[torch.Tensor] = [torch.zeros(0)] * size

    def exchange(self, rank: int, values: torch.Tensor) -> torch.Tensor:
        self._slots[rank] = values.clone()
        self._barrier.wait()
        everybody = torch.stack(self._slots)
        self._barrier.wait()
        return everybody

    def run(self, work: Callable[[Member], SparseTargets]) -> list[SparseTargets]:
        def one(rank: int) -> SparseTargets:
            try:
                with torch.no_grad():
                    return work(Member(self, rank))
            except BaseException:
                self._barrier.abort()  # the others would wait
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.size)]
            errors = [future.exception() for future in futures]
        first = next((e for e in errors if e and not isinstance(e, threading.BrokenBarrierError)), None)
        if first:
            raise first
        return [future.result() for future in futures]


class Member:
    """One of them."""

    def __init__(self, together: Together, rank: int) -> None:
        self.rank, self.size, self._together = rank, together.size, together

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        return self._together.exchange(self.rank, values).amax(0)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        assert values.dtype == torch.int64  # order of a reduction would matter for floats
        return self._together.exchange(self.rank, values).sum(0)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return self._together.exchange(self.rank, values)


def _cut(
    logits_NV: torch.Tensor, edges: tuple[int, ...], request: dict[str, Any], share: Callable[..., Any] = TorchShare
) -> list[SparseTargets]:
    def work(member: Member) -> SparseTargets:
        local_NV = logits_NV[:, edges[member.rank] : edges[member.rank + 1]]
        return steps.sample(share(local_NV, edges[member.rank]), Request(**request), member, logits_NV.shape[1])

    return Together(len(edges) - 1).run(work)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cuts_of_the_vocabulary_change_no_bit(kind: str, half: bool) -> None:
    logits_NV = _rows().bfloat16() if half else _rows()
    for draws in (1, 20, 301):
        request = _request(kind, 8, draws)
        whole = sample(logits_NV, **request)
        for edges in CUTS.values():
            for found in _cut(logits_NV, edges, request):
                _assert_same(found, whole)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(KINDS), draws=st.sampled_from([1, 3, 50]), seed=st.integers(0, 1 << 20))
def test_any_cut(data: st.DataObject, kind: str, draws: int, seed: int) -> None:
    vocabulary = data.draw(st.integers(5, 200))
    inner = data.draw(st.sets(st.integers(1, vocabulary - 1), max_size=4))
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(3, vocabulary, generator=generator) * 5
    logits_NV[torch.rand(3, vocabulary, generator=generator) < 0.4] = -math.inf
    logits_NV[:, -1] = logits_NV[:, 0] = 0.0
    request = {**_request(kind, 3, draws), "labels_N": torch.tensor([0, vocabulary - 1, -100]), "seed": seed}
    whole = sample(logits_NV, **request)
    for found in _cut(logits_NV, (0, *sorted(inner), vocabulary), request):
        _assert_same(found, whole)


@pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", KINDS)
def test_triton_slices_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices by Triton and by PyTorch side by side; one thread at a time, for the interpreter has global state."""
    pytest.importorskip("triton")
    from stillroom.kernels.sample import triton as launches

    sizes = launches.Sizes(block=32, key_block=16, tile=256, draws=16)
    monkeypatch.setattr(launches.Sizes, "of", lambda _: sizes)
    lock = threading.Lock()

    class Locked(launches.TritonShare):
        def maxima(self) -> torch.Tensor:
            with lock:
                return super().maxima()

        def weigh(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            with lock:
                return super().weigh(*args)

        def heads(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            with lock:
                return super().heads(*args)

        def locate(self, *args: Any) -> torch.Tensor:
            with lock:
                return super().locate(*args)

        def largest(self, *args: Any) -> torch.Tensor:
            with lock:
                return super().largest(*args)

    logits_NV, request = _rows()[[2, 5, 6]], _request(kind, 3)
    whole = sample(logits_NV, **request)
    for found in _cut(
        logits_NV, (0, 98, 300, 301), request,
        lambda local_NV, start: TorchShare(local_NV, start) if start == 300 else Locked(local_NV, start),
    ):  # fmt: skip
        _assert_same(found, whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_of_one_slice(bad: float) -> None:
    """Whoever holds them, everybody refuses the row: nobody is left waiting."""
    logits_NV = _rows()
    logits_NV[3, 299] = bad
    logits_NV[4, 0] = bad
    for kind in KINDS:
        with pytest.raises(ValueError, match="row 3 holds NaN"):
            _cut(logits_NV, CUTS[4], _request(kind, 8))


def test_slices_must_cover_the_vocabulary() -> None:
    logits_NV = _rows()

    def work(member: Member) -> SparseTargets:
        start = (0, 100)[member.rank]
        share = TorchShare(logits_NV[:, start : start + 150], start)
        return steps.sample(share, Request(**_request("threshold", 8)), member, VOCABULARY)

    with pytest.raises(ValueError, match="wanted them to follow each other from 0 to 301"):
        Together(2).run(work)


def test_one_process_needs_a_group_and_its_own_slice() -> None:
    request = _request("threshold", 8)
    with pytest.raises(ValueError, match="init_process_group"):
        sample_sharded(_rows(), **request, vocab_start=0, vocab_size=VOCABULARY)
    for start, size in ((1, VOCABULARY), (-1, VOCABULARY), (0, 300), (0, (1 << 22) + 1)):
        with pytest.raises(ValueError, match="`vocab_start` and `vocab_size`"):
            sample_sharded(_rows(), **request, vocab_start=start, vocab_size=size)
    _assert_same(
        steps.sample(TorchShare(_rows(), 0), Request(**request), Alone(), VOCABULARY), sample(_rows(), **request)
    )


# ---- real processes --------------------------------------------------------------------------------------------------

RANKS = 4


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    groups = {2: dist.new_group([0, 1]), 4: None}
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for (size, group), kind in itertools.product(groups.items(), KINDS):
        if rank >= size:
            continue
        start, stop = CUTS[size][rank : rank + 2]
        targets = sample_sharded(
            _rows()[:, start:stop], **_request(kind, 8), vocab_start=start, vocab_size=VOCABULARY, group=group
        )
        found[size, kind] = {name: getattr(targets, name) for name in NAMES}
    logits_NV = _rows()
    logits_NV[3, 299] = math.nan  # held by rank 2 of 4
    start, stop = CUTS[4][rank : rank + 2]
    try:
        sample_sharded(logits_NV[:, start:stop], **_request("threshold", 8), vocab_start=start, vocab_size=VOCABULARY)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes(tmp_path: Path) -> None:
    """Groups of two and of four out of four processes; NaN on one of them is refused by all."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(RANKS)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * RANKS
    finally:
        for process in ranks:
            process.kill()
    whole = {kind: sample(_rows(), **_request(kind, 8)) for kind in KINDS}
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == set(itertools.product((2, 4) if rank < 2 else (4,), KINDS))
        for (_, kind), tensors in found.items():
            _assert_same(SparseTargets(**tensors), whole[kind])
        assert "row 3 holds NaN" in (tmp_path / f"{rank}.txt").read_text()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
