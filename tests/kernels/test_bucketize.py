"""Buckets of a row: against dense autograd, and as the ground other losses are built on.

Shapes: `N` rows, `V` vocabulary, `E` entries, `T` temperatures, `K` entries of a row, padded.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.kernels.bucketize import Buckets, bucketize, reference

BACKENDS = [
    pytest.param("cpu", "reference", id="cpu-reference"),
    pytest.param(
        "cpu",
        "triton",
        id="cpu-triton",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter is off"),
    ),
    pytest.param("cuda", "reference", id="cuda-reference", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="cuda-triton", marks=pytest.mark.gpu),
]
backends = pytest.mark.parametrize(("device", "impl"), BACKENDS)


def precise(impl: str) -> tuple[torch.dtype, float]:
    """The widest floating point of an implementation and what to ask of it."""
    return (torch.float64, 1e-12) if impl == "reference" else (torch.float32, 2e-6)


def case(
    seed: int = 0, rows: int = 7, vocabulary: int = 83, kept: int = 9, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, offsets, ids, labels: a row without entries, one without a label, labels inside and outside the support."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * spread
    counts = torch.randint(1, min(kept, vocabulary) + 1, (rows,), generator=generator).tolist()
    counts[1:2] = [0] * len(counts[1:2])
    ids = torch.cat([torch.randperm(vocabulary, generator=generator)[:k] for k in counts]).int()
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels_N[0] = ids[counts[0] - 1]
    labels_N[2:3] = -100
    return logits_NV, torch.tensor([0, *itertools.accumulate(counts)]), ids, labels_N


def dense(
    logits_NV: Tensor, offsets: Tensor, ids: Tensor, labels_N: Tensor | None, temperatures: tuple[float, ...]
) -> Buckets:
    """The definition, row by row, in the logits' dtype."""
    support, label, tail = [], [], []
    for n, row_V in enumerate(logits_NV):
        row_ids = ids[offsets[n] : offsets[n + 1]].long()
        kept_V = torch.zeros(len(row_V), dtype=torch.bool, device=row_V.device).index_fill_(0, row_ids, True)
        has_label = labels_N is not None and labels_N[n] >= 0
        if labels_N is not None and has_label:
            kept_V[labels_N[n]] = True
        support.append(row_V[row_ids])
        label.append(row_V[labels_N[n]] if labels_N is not None and has_label else row_V.new_zeros(()))
        rest = row_V[~kept_V]
        tail.append(
            torch.stack([(rest / t).logsumexp(0) if len(rest) else row_V.new_tensor(-math.inf) for t in temperatures])
        )
    return Buckets(torch.cat(support), None if labels_N is None else torch.stack(label), torch.stack(tail))


def total(buckets: Buckets, seed: int = 5) -> Tensor:
    """A scalar with a different random upstream gradient for every output of every row; empty tails left out."""
    generator = torch.Generator().manual_seed(seed)
    loss = buckets.support_E.new_zeros(())
    for part in (buckets.support_E, buckets.label_N, buckets.tail_NT):
        if part is not None:
            weight = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)
            loss = loss + (weight * torch.where(part.isfinite(), part, 0.0)).sum()
    return loss


def moved(device: str, *tensors: Tensor) -> list[Tensor]:
    return [x.to(device) for x in tensors]


@backends
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.5), (0.5, 1.0, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_dense_autograd(dtype: torch.dtype, temperatures: tuple[float, ...], device: str, impl: str) -> None:
    """Values and gradient with a random upstream gradient per row; a half-precision gradient is rounded once."""
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("float64 is the reference's")
    logits_NV, offsets, ids, labels_N = moved(device, *case())
    for labels in (labels_N, None):
        z = logits_NV.to(dtype, copy=True).requires_grad_()
        exact_z = z.detach().double().requires_grad_()
        wanted = dense(exact_z, offsets, ids, labels, temperatures)
        total(wanted).backward()  # type: ignore[no-untyped-call]
        got = bucketize(z, offsets, ids, labels, temperatures, impl)
        total(got).backward()  # type: ignore[no-untyped-call]
        value = 1e-12 if dtype == torch.float64 else 1e-6
        for ours, theirs in ((got.support_E, wanted.support_E), (got.tail_NT, wanted.tail_NT)):
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.allclose(ours.double(), theirs, rtol=value, atol=value)
        if labels is not None:
            assert got.label_N is not None
            assert wanted.label_N is not None
            assert torch.equal(got.label_N.double(), wanted.label_N)
        else:
            assert got.label_N is None
        assert z.grad is not None
        assert exact_z.grad is not None
        assert z.grad.dtype == dtype
        half_unit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        small = 2e-7 if dtype != torch.float16 else 2**-24  # float16 runs out of exponents
        assert torch.allclose(z.grad.double(), exact_z.grad, rtol=half_unit * 1.01, atol=small)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), rows=st.integers(0, 6), vocabulary=st.integers(1, 70), kept=st.integers(1, 70),
    spread=st.sampled_from([0.0, 2.0, 60.0]), block=st.sampled_from([1, 150, 1 << 20]), strided=st.booleans(),
)  # fmt: skip
def test_equals_dense_anywhere(
    seed: int, rows: int, vocabulary: int, kept: int, spread: float, block: int, strided: bool
) -> None:
    logits_NV, offsets, ids, labels_N = case(seed, max(rows, 1), vocabulary, kept, spread)
    if not rows:
        logits_NV, offsets, ids, labels_N = logits_NV[:0], offsets[:1], ids[:0], labels_N[:0]
    if strided:
        logits_NV = torch.stack((logits_NV, logits_NV + 1), 2)[:, :, 0]
    z = logits_NV.float().requires_grad_()
    exact_z = z.detach().double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_ELEMENTS", block)
        got = bucketize(z, offsets, ids, labels_N, (1.0, 2.0), "reference")
        (gradient,) = torch.autograd.grad(total(got), z)
    if rows:
        wanted = dense(exact_z, offsets, ids, labels_N, (1.0, 2.0))
        (exact,) = torch.autograd.grad(total(wanted), exact_z)
        assert torch.allclose(got.tail_NT.double(), wanted.tail_NT, rtol=1e-6, atol=1e-6 * (1 + spread))
        assert torch.allclose(gradient.double(), exact, rtol=1e-5, atol=1e-6 + 1e-7 * spread)
    assert gradient.shape == z.shape


@backends
def test_wide_rows_and_long_supports(device: str, impl: str) -> None:
    """More columns than a block of the kernel, more entries than an entry block, and a vocabulary that divides nothing."""
    logits_NV, offsets, ids, labels_N = moved(device, *case(rows=3, vocabulary=9_001, kept=300))
    z = logits_NV.float().requires_grad_()
    exact_z = logits_NV.float().double().requires_grad_()
    got, wanted = (
        bucketize(z, offsets, ids, labels_N, (1.0, 2.0), impl),
        dense(exact_z, offsets, ids, labels_N, (1.0, 2.0)),
    )
    assert torch.allclose(got.tail_NT.double(), wanted.tail_NT, rtol=1e-6)
    assert torch.equal(got.support_E.double(), wanted.support_E)
    (gradient,) = torch.autograd.grad(total(got), z)
    (exact,) = torch.autograd.grad(total(wanted), exact_z)
    assert torch.allclose(gradient.double(), exact, rtol=1e-5, atol=1e-8)


@backends
@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 151_936, 262_144])
def test_error_budget_at_models_vocabularies(vocabulary: int, device: str, impl: str) -> None:
    """bfloat16 logits: errors at most twice those of eager float32 on the same input, plus the gradient's one rounding."""
    logits_NV, offsets, ids, labels_N = moved(device, *case(rows=3, vocabulary=vocabulary, kept=257))
    z = logits_NV.bfloat16().requires_grad_()
    exact_z, eager_z = (z.detach().to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32))
    arguments = (offsets, ids, labels_N, (1.0, 2.0))
    found = []
    for leaf, b in (
        (exact_z, dense(exact_z, *arguments)),
        (eager_z, dense(eager_z, *arguments)),
        (z, bucketize(z, *arguments, impl)),
    ):
        found.append([b.tail_NT.detach().double(), torch.autograd.grad(total(b), leaf)[0].double()])
    for name, exact, eager, ours in zip(("tail", "gradient"), *found):
        mine, its = float((ours - exact).norm()), float((eager - exact).norm())
        unit = (2**-8 if name == "gradient" else 2**-24) * float(exact.norm())
        assert mine <= 2 * its + unit, f"{name}: ours {mine:.2e}, eager {its:.2e}, unit {unit:.2e}"


def test_gradcheck() -> None:
    logits_NV, offsets, ids, labels_N = case(rows=4, vocabulary=7, kept=4)

    def outputs(z: Tensor) -> tuple[Tensor, ...]:
        got = bucketize(z, offsets, ids, labels_N, (1.0, 2.0), "reference")
        assert got.label_N is not None
        return got.support_E, got.label_N, got.tail_NT

    assert torch.autograd.gradcheck(outputs, logits_NV.requires_grad_())


# ---- what it is for ------------------------------------------------------------------------------------------------------


def jsd_and_ce(z: Tensor, offsets: Tensor, ids: Tensor, labels_N: Tensor, teacher_NK: Tensor, impl: str) -> Tensor:
    """Cross-entropy at T = 1 plus Jensen-Shannon at T = 2 with the tail as a bucket, in `[N]`; K entries per row."""
    b = bucketize(z, offsets, ids, None, (1.0, 2.0), impl)
    label_N = bucketize(z, offsets, ids, labels_N, impl=impl).label_N
    assert label_N is not None
    support_NK = b.support_E.view(len(z), -1)
    ce_N = torch.cat((support_NK, b.tail_NT[:, :1]), 1).logsumexp(1) - label_N
    logq_NK = torch.cat((support_NK / 2, b.tail_NT[:, 1:]), 1).log_softmax(1)
    logm_NK = ((teacher_NK + logq_NK.exp()) / 2).log()
    js_NK = torch.xlogy(teacher_NK, teacher_NK) - teacher_NK * logm_NK + logq_NK.exp() * (logq_NK - logm_NK)
    return ce_N + js_NK.sum(1) / 2


@backends
def test_a_loss_in_ten_lines_equals_dense_autograd(device: str, impl: str) -> None:
    """The same loss over explicit buckets of the whole vocabulary; every row has its own upstream gradient."""
    rows, vocabulary, kept = 5, 60, 6
    dtype, unit = precise(impl)
    generator = torch.Generator().manual_seed(3)
    logits_NV = (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 2).to(device)
    ids_NK = torch.stack([torch.randperm(vocabulary, generator=generator)[:kept] for _ in range(rows)]).to(device)
    teacher_NK = torch.rand(rows, kept + 1, generator=generator, dtype=torch.float64).to(device)
    teacher_NK = teacher_NK / teacher_NK.sum(1, keepdim=True)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator).to(device)
    upstream_N = torch.randn(rows, generator=generator, dtype=torch.float64).to(device)

    z = logits_NV.clone().requires_grad_()
    q_NV = (z / 2).softmax(1)
    support_NK = q_NV.gather(1, ids_NK)
    in_tail_NV = torch.ones_like(q_NV).scatter(1, ids_NK, 0.0)
    q_NK = torch.cat((support_NK, (q_NV * in_tail_NV).sum(1, keepdim=True)), 1)
    m_NK = (teacher_NK + q_NK) / 2
    js_N = (teacher_NK * (teacher_NK / m_NK).log() + q_NK * (q_NK / m_NK).log()).sum(1) / 2
    wanted_N = F.cross_entropy(z, labels_N, reduction="none") + js_N
    (exact,) = torch.autograd.grad((wanted_N * upstream_N).sum(), z)

    mine = logits_NV.to(dtype).requires_grad_()
    offsets = torch.arange(rows + 1, device=device) * kept
    got_N = jsd_and_ce(mine, offsets, ids_NK.flatten().int(), labels_N, teacher_NK, impl)
    (gradient,) = torch.autograd.grad((got_N * upstream_N).sum(), mine)
    assert torch.allclose(got_N, wanted_N, rtol=unit, atol=unit)
    assert torch.allclose(gradient.double(), exact, rtol=10 * unit, atol=unit)


@backends
def test_a_tail_of_almost_nothing_keeps_its_digits(device: str, impl: str) -> None:
    """Tails of e**-12 to e**-90 of the whole: 1 minus the support's share would be noise or 0."""
    gap_N = torch.tensor([12.0, 21.0, 90.0], device=device)
    logits_NV = -gap_N[:, None].repeat(1, 40)
    logits_NV[:, :4] = 1.0
    ids = torch.arange(4, device=device).repeat(3)
    got = bucketize(logits_NV, torch.arange(4, device=device) * 4, ids, impl=impl)
    assert got.tail_NT[:, 0].tolist() == pytest.approx((math.log(36) - gap_N).tolist(), rel=1e-6)


# ---- the mistakes of others ------------------------------------------------------------------------------------------------


@backends
def test_empty_tails_and_masked_columns_make_no_nan(device: str, impl: str) -> None:
    """The whole vocabulary kept; all columns -inf but the support; everything -inf: -inf tails, and no NaN gradient."""
    logits_NV = torch.zeros(4, 6, device=device)
    logits_NV[1, 2:] = -math.inf
    logits_NV[2] = -math.inf
    logits_NV[3, 4:] = -math.inf
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 0, 1], device=device)
    offsets = torch.tensor([0, 6, 8, 10, 12], device=device)
    z = logits_NV.requires_grad_()
    got = bucketize(z, offsets, ids, None, (1.0, 2.0), impl)
    assert got.tail_NT[:3].tolist() == [[-math.inf] * 2] * 3
    assert got.tail_NT[3].tolist() == pytest.approx([math.log(2)] * 2)
    finite_E = torch.where(got.support_E.isfinite(), got.support_E, -1e4)
    # exp(-inf) of an empty tail times its logarithm is the NaN a careless loss sends back; it must not arrive
    careless = (got.tail_NT.exp() * got.tail_NT).sum() + finite_E.square().sum()
    (gradient,) = torch.autograd.grad(careless, z)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[1:, 4:] == 0).all())


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_left_as_they_were(dtype: torch.dtype, device: str, impl: str) -> None:
    """Bit for bit: the holes the kernel punches are filled again. A second head sees what it should."""
    logits_NV, offsets, ids, labels_N = moved(device, *case())
    z = logits_NV.to(dtype).requires_grad_()
    before = z.detach().clone()
    shared = z * 1
    first = shared.float().square().sum()
    loss = total(bucketize(shared, offsets, ids, labels_N, impl=impl))
    assert torch.equal(shared.detach(), before)
    (both,) = torch.autograd.grad(first + loss, z)
    (alone,) = torch.autograd.grad(total(bucketize(z, offsets, ids, labels_N, impl=impl)), z)
    unit = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(both.double(), alone.double() + 2 * before.double(), rtol=unit, atol=unit)
    assert torch.equal(z.detach(), before)


@backends
def test_rows_that_share_memory_or_lie_apart(device: str, impl: str) -> None:
    """An expanded row must not be punched twice; padded and transposed strides and odd label addresses are fine."""
    logits_NV, offsets, ids, labels_N = moved(device, *case())
    dtype, unit = precise(impl)
    logits_NV = logits_NV.to(dtype)
    odd_labels_N = torch.cat((labels_N[:1], labels_N))[1:]
    wide = torch.zeros(7, 90, dtype=dtype, device=device)
    for view in (
        wide[:, 3:86].copy_(logits_NV),
        logits_NV.t().contiguous().t(),
        logits_NV[:1].expand(7, -1),
    ):
        z = view.detach().requires_grad_()
        (got,) = torch.autograd.grad(total(bucketize(z, offsets, ids, odd_labels_N, impl=impl)), z)
        exact_z = view.detach().clone().requires_grad_()
        (wanted,) = torch.autograd.grad(total(dense(exact_z, offsets, ids, labels_N, (1.0,))), exact_z)
        assert torch.allclose(got, wanted, rtol=unit, atol=unit)


@backends
def test_every_second_element_of_ids_labels_and_gradients(device: str, impl: str) -> None:
    """Kernels count in elements: strided arguments must not be read as if they lay side by side."""
    logits_NV, offsets, ids, labels_N = moved(device, *case())
    offsets, ids, labels_N = (torch.stack((x, x), 1)[:, 0] for x in (offsets, ids, labels_N))
    z = logits_NV.float().requires_grad_()
    got = bucketize(z, offsets, ids, labels_N, impl=impl)
    wanted = dense(z, offsets, ids, labels_N, (1.0,))
    upstream_E = torch.randn(2 * len(ids), device=device)[::2]
    (ours,) = torch.autograd.grad((got.support_E, got.tail_NT.sum()), z, (upstream_E, torch.ones((), device=device)))
    (exact,) = torch.autograd.grad(
        (wanted.support_E, wanted.tail_NT.sum()), z, (upstream_E, torch.ones((), device=device))
    )
    assert torch.equal(got.support_E, wanted.support_E)
    assert torch.allclose(ours, exact, rtol=1e-5, atol=1e-7)


@backends
def test_nothing_of_the_logits_size_is_saved_but_the_logits(device: str, impl: str) -> None:
    logits_NV, offsets, ids, labels_N = moved(device, *case(rows=16, vocabulary=500))
    z = logits_NV.float().requires_grad_()
    saved: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        bucketize(z, offsets, ids, labels_N, (1.0, 2.0), impl)
    large = [x for x in saved if x.numel() >= 1_000]
    assert [x.data_ptr() for x in large] == [z.data_ptr()]


@pytest.mark.parametrize("impl", ["reference"])
def test_second_derivative_is_refused(impl: str) -> None:
    logits_NV, offsets, ids, labels_N = case()
    z = logits_NV.requires_grad_()
    (gradient,) = torch.autograd.grad(total(bucketize(z, offsets, ids, labels_N, impl=impl)), z, create_graph=True)
    with pytest.raises(RuntimeError, match="bucketize_backward"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


# ---- operators -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_operators_keep_the_rules_of_torch_library(labelled: bool) -> None:
    logits_NV, offsets, ids, labels_N = case()
    labels = labels_N if labelled else None
    z = logits_NV.requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.stillroom
    torch.library.opcheck(operators.bucketize, (z, offsets, ids, labels, [1.0, 2.0], 0, "reference"), test_utils=checks)
    b = operators.bucketize(z.detach(), offsets, ids, labels, [1.0, 2.0], 0, "reference")
    torch.library.opcheck(
        operators.bucketize_backward,
        (z.detach(), offsets, ids, labels, b[2], b[0], b[1], b[2], [1.0, 2.0], 0, "reference"),
        test_utils=checks,
    )


def test_compiles_without_a_graph_break() -> None:
    logits_NV, offsets, ids, labels_N = case()

    def loss(z: Tensor) -> Tensor:
        b = bucketize(z * 2, offsets, ids, labels_N, (1.0, 2.0))
        assert b.label_N is not None
        return b.support_E.square().sum() + (b.label_N * 3).sum() - b.tail_NT.sum()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        z = logits_NV.clone().requires_grad_()
        function(z).backward()
        assert z.grad is not None
        grads.append(z.grad)
    assert torch.equal(grads[0], grads[1])


COMPILE = """
import glob, subprocess, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stillroom.kernels.bucketize import triton as ours

rows = dict(LOGITS="*bf16", stride="i32", OFFSETS="*i64", IDS="*i32", LABELS="*i64", INVERSE_T="*fp32")
sizes = dict(columns="i32", vocab_start="i32", temperatures="i32")
forward = dict(**rows, SUPPORT="*fp32", LABEL_LOGIT="*fp32", TAIL="*fp32", **sizes)
backward = dict(**rows, TAIL="*fp32", GRAD_SUPPORT="*fp32", GRAD_LABEL="*fp32", GRAD_TAIL="*fp32", GRAD="*bf16", **sizes)
for temperatures, labelled in ((1, True), (2, False)):
    how = ours._launch(128_256, 12, temperatures)
    warps = how.pop("num_warps")
    constants = dict(how, HAS_LABELS=labelled) | ({} if labelled else {"LABELS": None})
    for kernel, signature, more in ((ours._forward_kernel, forward, {}), (ours._backward_kernel, backward, {"EMULATE": False})):
        fixed = constants | more
        made = triton.compile(
            ASTSource(fn=kernel, signature={**signature, **dict.fromkeys(fixed, "constexpr")}, constexprs=fixed),
            target=GPUTarget("cuda", 90, 32), options={"num_warps": warps},
        )
        open("kernel.cubin", "wb").write(made.asm["cubin"])
        tool = glob.glob(triton.__path__[0] + "/backends/nvidia/bin/cuobjdump")[0]
        used = subprocess.run([tool, "--dump-resource-usage", "kernel.cubin"], capture_output=True, text=True, check=True)
        print(used.stdout)
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    """The compiler needs no GPU. Registers of 512 threads that leave room for three programs on a multiprocessor."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    registers = [int(x) for x in re.findall(r"REG:(\d+)", done.stdout)]
    assert len(registers) == 4
    assert max(registers) <= 65_536 // (3 * 512)
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout) == ["0"] * 8


@pytest.mark.gpu
def test_more_than_2_31_logits() -> None:
    vocabulary = 128_256
    rows = 2**31 // vocabulary + 2
    logits_NV = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits_NV[-1, 100_000] = 5.0
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device="cuda")
    offsets[-1] = 1
    ids = torch.tensor([100_000], device="cuda")
    z = logits_NV.requires_grad_()
    got = bucketize(z, offsets, ids, impl="triton")
    assert float(got.support_E[0]) == 5.0
    assert float(got.tail_NT[-1, 0]) == pytest.approx(math.log(vocabulary - 1), rel=1e-6)
    (gradient,) = torch.autograd.grad(got.support_E.sum() * 3, z)
    assert float(gradient[-1, 100_000]) == 3.0


# ---- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits_NV", dict(logits_NV=torch.zeros(83))),
        ("logits_NV", dict(logits_NV=torch.zeros(7, 83, dtype=torch.int64))),
        ("offsets", dict(offsets=torch.zeros(7, dtype=torch.int64))),
        ("offsets", dict(offsets=torch.zeros(8, dtype=torch.int32))),
        ("ids", dict(ids=torch.zeros(3))),
        ("ids", dict(ids=torch.full((40,), 83))),
        ("ids", dict(ids=torch.full((40,), -1))),
        ("labels_N", dict(labels_N=torch.zeros(6, dtype=torch.int64))),
        ("labels_N", dict(labels_N=torch.zeros(7, dtype=torch.int32))),
        ("labels_N", dict(labels_N=torch.full((7,), 83))),
        ("temperatures", dict(temperatures=())),
        ("temperatures", dict(temperatures=(1.0, 0.0))),
        ("temperatures", dict(temperatures=(math.nan,))),
        ("temperatures", dict(temperatures=(math.inf,))),
        ("impl", dict(impl="cuda")),
    ],
)
def test_errors_name_the_argument(name: str, changes: dict[str, Any]) -> None:
    logits_NV, offsets, ids, labels_N = case()
    arguments: dict[str, Any] = dict(logits_NV=logits_NV, offsets=offsets, ids=ids, labels_N=labels_N)
    bucketize(**arguments)
    with pytest.raises(ValueError, match=f"`{name}`"):
        bucketize(**{**arguments, **changes})
