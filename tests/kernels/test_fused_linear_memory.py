"""What the fused head keeps alive: every tensor it makes is watched, and held against `peak_bytes`.

Shapes: `N` rows, `V` vocabulary, `D` width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.kernels.fused_linear import CHUNK_ROWS, chunks, fused_linear_sparse_kd, gemm, peak_bytes
from stillroom.kernels.fused_linear.chunks import Wanted, run
from stillroom.kernels.fused_linear.plan import COLUMNS, rows_per_chunk
from stillroom.kernels.fused_linear.spec import Spec
from stillroom.kernels.sparse_kd import reference
from stillroom.kernels.sparse_kd.problem import Problem, make_problem
from stillroom.kernels.targets import SparseTargets

KEPT = 4
ROWS, VOCABULARY, WIDTH = 128, 4_000, 16
BLOCK = VOCABULARY


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages made while it is on: the most that lived at once, and every size."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.sizes: list[int] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages and storage._cdata not in given:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.sizes.append(storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def problem(rows: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
    generator = torch.Generator().manual_seed(0)
    ids_NK = torch.stack([torch.randperm(vocabulary, generator=generator)[:KEPT] for _ in range(rows)])
    targets = SparseTargets(
        torch.arange(rows + 1) * KEPT, ids_NK.flatten().int(), torch.full((rows * KEPT,), 0.2), torch.zeros(rows),
        torch.zeros(rows),
    ).to(device)  # fmt: skip
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    return make_problem(targets, labels_N, vocabulary=vocabulary, dtype=dtype, device=torch.device(device), alpha=0.3)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Working memory of a few kilobytes where it is 16 MiB: it would hide everything else at these sizes."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((reference, "BLOCK_ELEMENTS"), (gemm, "BLOCK_ELEMENTS"), (chunks, "CAP_ELEMENTS")):
            patch.setattr(module, name, BLOCK)
        yield


@pytest.mark.parametrize(
    ("learns", "softcap"),
    [((True, True), None), ((True, True), 5.0), ((False, True), None), ((False, False), None), ((False, False), 5.0)],
)
@pytest.mark.parametrize("chunk_rows", [32, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_what_the_formula_says(
    dtype: torch.dtype, chunk_rows: int, learns: tuple[bool, bool], softcap: float | None
) -> None:
    """Within 2 % and four blocks of working memory; the largest tensor is the chunk of logits or the sum over chunks."""
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    spec = Spec(problem(ROWS, VOCABULARY, dtype), 1.0, softcap, VOCABULARY, chunk_rows, True, "reference", dtype)
    with small_blocks(), Alive() as alive:  # type: ignore[no-untyped-call]
        made = run(hidden_ND, weight_VD, None, spec, Wanted(*learns, False))
    assert made.kd_N.shape == (ROWS,)
    wanted = peak_bytes(
        ROWS, VOCABULARY, WIDTH, dtype, chunk_rows=chunk_rows, hidden_gradient=learns[0], weight_gradient=learns[1],
        softcap=softcap is not None and any(learns),
    )  # fmt: skip
    assert wanted * 0.98 <= alive.peak <= wanted * 1.02 + 4 * BLOCK * 4
    chunk = chunk_rows * -(-VOCABULARY // COLUMNS) * COLUMNS * dtype.itemsize
    assert max(alive.sizes) <= max(chunk, VOCABULARY * WIDTH * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_sized_temporaries_per_chunk(dtype: torch.dtype) -> None:
    """One tensor of the weight's size is made for all eight chunks: each adds into it."""
    hidden_ND, weight_VD = torch.randn(ROWS, 512).to(dtype), torch.randn(400, 512).to(dtype)
    spec = Spec(problem(ROWS, 400, dtype), 1.0, None, 400, 16, True, "reference", dtype)
    with small_blocks(), Alive() as alive:  # type: ignore[no-untyped-call]
        run(hidden_ND, weight_VD, None, spec, Wanted(False, True, False))
    assert [size for size in alive.sizes if size >= weight_VD.numel() * dtype.itemsize] == [weight_VD.numel() * 4]


def test_logits_sized_float32_buffer_inside_a_fused_loss() -> None:
    """However many rows there are, nothing of their number times the vocabulary is made, in any type."""
    peaks = []
    for rows in (64, 320):
        spec = Spec(
            problem(rows, VOCABULARY, torch.bfloat16), 1.0, None, VOCABULARY, 32, True, "reference", torch.bfloat16
        )
        hidden_ND, weight_VD = torch.randn(rows, 8).bfloat16(), torch.randn(VOCABULARY, 8).bfloat16()
        with small_blocks(), Alive() as alive:  # type: ignore[no-untyped-call]
            run(hidden_ND, weight_VD, None, spec, Wanted(True, True, False))
        peaks.append(alive.peak)
    assert peaks[1] - peaks[0] < 64 * VOCABULARY  # five times the rows; a chunk of logits is 32 * V * 2 bytes


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_for_backward(recompute: bool) -> None:
    """The gradients, or with `recompute` the arguments and nothing else."""
    dtype = torch.bfloat16
    hidden_ND = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    weight_VD = torch.randn(VOCABULARY, WIDTH).to(dtype).requires_grad_()
    p = problem(ROWS, VOCABULARY, dtype)
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = fused_linear_sparse_kd(
            hidden_ND, weight_VD, p.targets, p.labels_N, alpha=0.3, chunk_rows=64, recompute=recompute
        )
    large = [(x.shape, x.dtype) for x in saved if x.numel() > 20 * ROWS or x.shape == hidden_ND.shape]
    assert large == [
        (hidden_ND.shape, dtype),
        (weight_VD.shape, dtype if recompute else torch.float32),
    ]
    assert any(x.data_ptr() == weight_VD.data_ptr() for x in saved) == recompute
    out.loss.backward()  # type: ignore[no-untyped-call]
    assert weight_VD.grad is not None


@pytest.mark.parametrize("compact", [True, False])
def test_rows_without_weight_cost_no_products(compact: bool) -> None:
    """Nine rows in ten are masked, as in a dialogue: the products are done for the tenth that is left."""
    p = problem(ROWS, VOCABULARY, torch.float32)
    weight_N = torch.where(torch.arange(ROWS) % 10 == 0, p.weight_N, 0.0)
    p = Problem(p.targets, p.labels_N, weight_N, p.alpha)
    spec = Spec(p, 1.0, None, VOCABULARY, 32, compact, "reference", torch.float32)
    done: list[int] = []
    product = chunks.multiply_into

    def count(out_IJ: Tensor, a_IK: Tensor, b_KJ: Tensor, **options: Any) -> None:
        done.append(out_IJ.numel() * a_IK.shape[1])
        product(out_IJ, a_IK, b_KJ, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "multiply_into", count)
        run(torch.randn(ROWS, WIDTH), torch.randn(VOCABULARY, WIDTH), None, spec, Wanted(True, True, False))
    rows = 13 if compact else ROWS
    assert sum(done) == 3 * rows * VOCABULARY * WIDTH


@pytest.mark.parametrize(
    ("learns", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_frozen_parts_cost_no_products(learns: tuple[bool, bool], products: int) -> None:
    spec = Spec(problem(16, 100, torch.float32), 1.0, None, 100, None, True, "reference", torch.float32)
    done = 0
    product = chunks.multiply_into

    def count(*arguments: Any, **options: Any) -> None:
        nonlocal done
        done += 1
        product(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "multiply_into", count)
        run(torch.randn(16, 8), torch.randn(100, 8), None, spec, Wanted(*learns, False))
    assert done == products


def test_rows_per_chunk() -> None:
    """In half precision one piece up to 2 D + M rows, where it takes no more than the accumulator; else M; or what was asked."""
    half, single = torch.bfloat16, torch.float32
    assert rows_per_chunk(8_192, 4_096, half, None, True) == 8_192
    assert rows_per_chunk(2 * 4_096 + CHUNK_ROWS, 4_096, half, None, True) == 12_288
    assert rows_per_chunk(2 * 4_096 + CHUNK_ROWS + 1, 4_096, half, None, True) == CHUNK_ROWS
    assert rows_per_chunk(8_192, 4_096, half, None, False) == CHUNK_ROWS  # nothing is added up
    assert rows_per_chunk(8_192, 4_096, single, None, True) == CHUNK_ROWS  # the accumulator is the gradient itself
    assert rows_per_chunk(8_192, 4_096, half, 1_000, True) == 1_000
    assert rows_per_chunk(10, 4_096, single, 1_000, True) == 10
    for rows in (
        6_000,
        8_192,
        12_288,
    ):  # the rule's reason: logits in one piece are not more than chunk and accumulator
        one, vocabulary, width = rows * 128_256 * 2, 128_256, 4_096
        assert one <= CHUNK_ROWS * vocabulary * 2 + vocabulary * width * 4


def test_chunks_are_of_nearly_one_size() -> None:
    assert [p.stop - p.start for p in chunks._parts(5_000, 4_096)] == [2_560, 2_440]
    assert [p.stop - p.start for p in chunks._parts(7, 3)] == [3, 3, 1]
    assert list(chunks._parts(0, 3)) == []
    for rows in range(1, 300, 7):
        for most in (1, 3, 64, 100, 1_000):
            parts = list(chunks._parts(rows, most))
            assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
            assert parts[-1].stop == rows
            assert max(p.stop - p.start for p in parts) <= most


# ---- on the device ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "chunk_rows"), [(8_192, None), (16_384, None), (8_192, 1_024)])
def test_peak_on_the_device(rows: int, chunk_rows: int | None, dtype: torch.dtype) -> None:
    """`max_memory_allocated` of forward and backward within 10 % of the formula."""
    vocabulary, width = 128_256, 2_048
    hidden_ND = torch.randn(rows, width, device="cuda", dtype=dtype).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, device="cuda", dtype=dtype) * 0.02).requires_grad_()
    labels_N = torch.randint(0, vocabulary, (rows,), device="cuda")
    peaks = []
    for _ in range(2):  # the first compiles and makes workspaces
        hidden_ND.grad = weight_VD.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = fused_linear_sparse_kd(hidden_ND, weight_VD, None, labels_N, alpha=1.0, chunk_rows=chunk_rows)
        peaks = [torch.cuda.max_memory_allocated() - before]
        torch.cuda.reset_peak_memory_stats()
        out.loss.backward()  # type: ignore[no-untyped-call]
        peaks.append(torch.cuda.max_memory_allocated() - before)
    wanted = peak_bytes(rows, vocabulary, width, dtype, chunk_rows=chunk_rows)
    assert wanted * 0.9 <= peaks[0] <= wanted * 1.1
    made = 4 if dtype == torch.float32 or rows_per_chunk(rows, width, dtype, chunk_rows, True) < rows else 2
    scaled = (made + dtype.itemsize) * vocabulary * width + 2 * rows * width * dtype.itemsize
    assert peaks[1] <= scaled * 1.1


@pytest.mark.gpu
def test_more_than_2_31_logits_in_one_piece() -> None:
    vocabulary, width = 128_256, 64
    rows = 2**31 // vocabulary + 2
    hidden_ND = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels_N = torch.randint(0, vocabulary, (rows,), device="cuda")
    found = []
    for chunk_rows in (rows, 1_000):
        out = fused_linear_sparse_kd(hidden_ND, weight_VD, None, labels_N, alpha=1.0, chunk_rows=chunk_rows)
        found.append([out.loss.detach(), *torch.autograd.grad(out.loss, (hidden_ND, weight_VD))])
    for one, many in zip(*found):
        assert float((one.double() - many.double()).norm()) <= 2**-7 * float(one.double().norm())
