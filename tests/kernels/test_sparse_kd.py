"""The distillation loss: against dense float64 autograd, and on the mistakes others have made.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.kernels.sparse_kd import MISSING_MASS, SparseKDOutput, reference, sparse_kd_loss
from stillroom.kernels.targets import SparseTargets

Tensor = torch.Tensor


def make_targets(
    entries: list[int], vocabulary: int, generator: torch.Generator, mass: float = 1.0, ids: Tensor | None = None
) -> SparseTargets:
    """Random ids and weights of sum `mass` for rows of the given numbers of entries."""
    if ids is None:
        ids = torch.cat(
            [torch.zeros(0, dtype=torch.int64)] + [torch.randperm(vocabulary, generator=generator)[:k] for k in entries]
        )
    weight_E = torch.rand(len(ids), generator=generator, dtype=torch.float64) + 0.01
    row_E = torch.arange(len(entries)).repeat_interleave(torch.tensor(entries, dtype=torch.int64))
    weight_E = mass * weight_E / torch.zeros(len(entries), dtype=torch.float64).index_add_(0, row_E, weight_E)[row_E]
    offsets = torch.tensor([0, *itertools.accumulate(entries)])
    zeros = torch.zeros(len(entries))
    return SparseTargets(offsets, ids.int(), weight_E.float(), zeros, zeros)


def dense(
    logits_NV: Tensor, targets: SparseTargets | None, labels_N: Tensor, alpha: float, missing: str, weight_N: Tensor
) -> tuple[Tensor, list[float], list[float]]:
    """The definition, one row at a time, in the logits' dtype: loss, KD and CE by row."""
    logq_NV = logits_NV.log_softmax(1)
    loss, kds, ces = logits_NV.sum() * 0, list[float](), list[float]()
    for n in range(len(labels_N)):
        if labels_N[n] == -100 or weight_N[n] == 0:
            kds, ces = [*kds, 0.0], [*ces, 0.0]
            continue
        kd, ce = loss * 0, -logq_NV[n, labels_N[n]]
        if targets is not None and targets.offsets[n] < targets.offsets[n + 1]:
            entries = slice(int(targets.offsets[n]), int(targets.offsets[n + 1]))
            ids, w = targets.ids[entries].long(), targets.weights[entries].to(logits_NV.dtype)
            logq = logits_NV[n, ids].log_softmax(0) if missing == "renormalise_both" else logq_NV[n, ids]
            if missing.startswith("renormalise"):
                w = w / w.sum()
            kd = (torch.xlogy(w, w) - w * logq).sum()
            if missing == "tail_bucket" and len(ids) < logits_NV.shape[1]:
                tail = torch.ones(logits_NV.shape[1], dtype=torch.bool).index_fill_(0, ids, False)
                rest = (1 - w.sum()).clamp_min(0)
                kd = kd + torch.xlogy(rest, rest) - rest * logq_NV[n][tail].logsumexp(0)
        loss = loss + weight_N[n] * ((1 - alpha) * kd + alpha * ce)
        kds, ces = [*kds, float(kd.detach())], [*ces, float(ce.detach())]
    return loss, kds, ces


def truth(logits_NV: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, list[float], list[float]]:
    """Dense float64 loss, gradient, KD and CE by row; arguments as of `dense`."""
    z = logits_NV.detach().double().requires_grad_()
    loss, kds, ces = dense(z, *arguments)
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient, kds, ces


device = {"name": "cpu"}  # where `run` runs


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    device["name"] = request.param
    yield
    device["name"] = "cpu"


def run(logits_NV: Tensor, *arguments: Any, upstream: float = 1.0, **options: Any) -> tuple[SparseKDOutput, Tensor]:
    """Output and gradient of the loss behind one upstream operation, on the test's device and back."""
    there = device["name"]
    z = logits_NV.detach().clone(memory_format=torch.preserve_format).to(there).requires_grad_()
    given = [x if x is None else x.to(there) for x in arguments]
    options = {name: value.to(there) if isinstance(value, Tensor) else value for name, value in options.items()}
    out = sparse_kd_loss(z * 1.0, *given, **options)
    (out.loss * upstream).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    return SparseKDOutput(out.loss.cpu(), out.kd_N.cpu(), out.ce_N.cpu()), z.grad.cpu()


def problem(
    seed: int = 0, rows: int = 9, vocabulary: int = 93, kept: int = 12, mass: float = 1.0, spread: float = 3.0
) -> tuple[Tensor, SparseTargets, Tensor, Tensor]:
    """Logits, targets, labels and row weights with every special row: empty, ignored, weightless, label in and out."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(rows, vocabulary, generator=generator) * spread
    entries = torch.randint(1, kept + 1, (rows,), generator=generator).tolist()
    entries[1:2] = [0] if rows > 4 else entries[1:2]
    targets = make_targets(entries, vocabulary, generator, mass)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    weight_N = torch.rand(rows, generator=generator) + 0.1
    if rows > 4:
        labels_N[0] = targets.ids[0]
        labels_N[2] = -100
        weight_N[3] = 0.0
    return logits_NV, targets, labels_N, weight_N


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("missing", MISSING_MASS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_dense_autograd(dtype: torch.dtype, missing: str, alpha: float, inplace: bool) -> None:
    """Every output and gradient, upstream gradient 3.7. A half-precision gradient is rounded twice: once, and times 3.7."""
    logits_NV, targets, labels_N, weight_N = problem(mass=0.8)
    logits_NV = logits_NV.to(dtype)
    loss, gradient, kds, ces = truth(logits_NV, targets, labels_N, alpha, missing, weight_N)
    out, got = run(
        logits_NV,
        targets,
        labels_N,
        alpha=alpha,
        missing=missing,
        row_weights_N=weight_N,
        inplace=inplace,
        upstream=3.7,
    )
    unit = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    small = 1e-7 if dtype != torch.float16 else 2**-24  # float16 runs out of exponents
    assert got.dtype == dtype
    assert torch.allclose(got.double(), 3.7 * gradient, rtol=2 * unit, atol=5 * small)
    value = 1e-6 if dtype != torch.float64 else 1e-12
    assert float(out.loss.detach()) == pytest.approx(float(loss), rel=value)
    assert out.kd_N.tolist() == pytest.approx(kds, rel=value, abs=value)
    assert out.ce_N.tolist() == pytest.approx(ces, rel=value, abs=value)
    assert not out.kd_N.requires_grad
    assert bool((got[2] == 0).all() and (got[3] == 0).all())  # ignored and weightless rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), rows=st.integers(1, 9), vocabulary=st.integers(1, 70), kept=st.integers(1, 90),
    mass=st.sampled_from([0.3, 0.9, 1.0]), spread=st.sampled_from([0.0, 1.0, 8.0, 60.0]), alpha=st.sampled_from([0.0, 0.4, 1.0]),
    missing=st.sampled_from(MISSING_MASS), block=st.sampled_from([1, 150, 1 << 20]), strided=st.booleans(),
)  # fmt: skip
def test_equals_dense_autograd_anywhere(
    seed: int, rows: int, vocabulary: int, kept: int, mass: float, spread: float, alpha: float, missing: str, block: int,
    strided: bool,
) -> None:  # fmt: skip
    logits_NV, targets, labels_N, weight_N = problem(seed, rows, vocabulary, min(kept, vocabulary), mass, spread)
    if strided:
        logits_NV = torch.stack((logits_NV, logits_NV + 1), 2)[:, :, 0]
    loss, gradient, _, _ = truth(logits_NV, targets, labels_N, alpha, missing, weight_N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK_ELEMENTS", block)
        patch.setattr(reference, "DIRECT_ELEMENTS", block)
        out, got = run(logits_NV, targets, labels_N, alpha=alpha, missing=missing, row_weights_N=weight_N)
    # float32 log-probabilities of size `spread` carry spread * 2**-24 each
    assert float(out.loss.detach()) == pytest.approx(float(loss), rel=1e-5, abs=1e-5 * (1 + spread))
    assert torch.allclose(got.double(), gradient, rtol=1e-5, atol=1e-6 + 1e-7 * spread)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("missing", MISSING_MASS)
def test_gradcheck(missing: str, alpha: float) -> None:
    logits_NV, targets, labels_N, weight_N = problem(rows=5, vocabulary=7, kept=4, mass=0.7)

    def loss(z: Tensor) -> Tensor:
        return sparse_kd_loss(z, targets, labels_N, alpha=alpha, missing=missing, row_weights_N=weight_N).loss

    assert torch.autograd.gradcheck(loss, logits_NV.double().requires_grad_())


@pytest.mark.parametrize("missing", MISSING_MASS)
def test_finite_differences_of_the_reported_loss(missing: str) -> None:
    """The number that is logged is the one whose gradient is returned, default row weights included."""
    logits_NV, targets, labels_N, _ = problem(mass=0.8)
    logits_NV = logits_NV.double()

    def reported(z: Tensor) -> float:
        with torch.no_grad():
            return float(sparse_kd_loss(z, targets, labels_N, alpha=0.3, missing=missing).loss)

    _, gradient = run(logits_NV, targets, labels_N, alpha=0.3, missing=missing)
    step_NV = torch.randn(logits_NV.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-5
    slope = reported(logits_NV + step_NV) - reported(logits_NV - step_NV)
    assert slope == pytest.approx(2 * float((gradient * step_NV).sum()), rel=1e-6)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", MISSING_MASS)
@pytest.mark.parametrize(("vocabulary", "spread"), [(1_000, 3.0), (32_000, 3.0), (32_001, 12.0)])
def test_error_budget(vocabulary: int, spread: float, missing: str, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of eager PyTorch with the same input, which rounds the gradient once too."""
    logits_NV, targets, labels_N, weight_N = problem(rows=8, vocabulary=vocabulary, kept=50, mass=0.9, spread=spread)
    logits_NV = logits_NV.to(dtype)
    loss, gradient, _, _ = truth(logits_NV, targets, labels_N, 0.3, missing, weight_N)
    out, got = run(logits_NV, targets, labels_N, alpha=0.3, missing=missing, row_weights_N=weight_N)
    z = logits_NV.clone().requires_grad_()
    eager, _, _ = dense(z.float(), targets, labels_N, 0.3, missing, weight_N)
    eager.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    # what the last rounding may cost: half a unit for a gradient; for the loss its rows are rounded before, half a unit more
    for name, ours, theirs, exact, roundings in (
        ("loss", out.loss.detach(), eager.detach(), loss, 2),
        ("gradient, largest", got, z.grad, gradient, 1),
    ):
        mine, its = float((ours - exact).abs().max()), float((theirs - exact).abs().max())
        unit = roundings * float(torch.finfo(ours.dtype).eps) * float(exact.abs().max()) / 2
        assert mine <= 2 * its + unit, f"{name}: ours {mine:.2e}, eager {its:.2e}, unit {unit:.2e}"
    mine, its = float((got - gradient).norm()), float((z.grad - gradient).norm())
    unit = float(torch.finfo(got.dtype).eps) * float(gradient.norm()) / 2
    assert mine <= 2 * its + unit, f"gradient, norm: ours {mine:.2e}, eager {its:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_close_to_the_target(dtype: torch.dtype) -> None:
    """|q - w| is 1e-3 of q: subtracting a rounded bfloat16 q would leave nothing; relative error stays that of q in float32."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (torch.randn(20, 500, generator=generator) * 2).to(dtype)
    q_NV = logits_NV.double().softmax(1)
    ids_NK = q_NV.topk(30, 1).indices
    factor_NK = 1 + 1e-3 * torch.where(torch.rand(20, 30, generator=generator) < 0.5, -1.0, 1.0)
    targets = SparseTargets(
        torch.arange(21) * 30, ids_NK.flatten().int(), (q_NV.gather(1, ids_NK) * factor_NK).flatten().float(),
        torch.zeros(20), torch.zeros(20),
    )  # fmt: skip
    labels_N = torch.zeros(20, dtype=torch.int64)
    _, gradient, _, _ = truth(logits_NV, targets, labels_N, 0.0, "renormalise_teacher", torch.ones(20))
    _, got = run(logits_NV, targets, labels_N, alpha=0.0, missing="renormalise_teacher", row_weights_N=torch.ones(20))
    relative = ((got.double() - gradient) / gradient).gather(1, ids_NK).abs().median()
    assert float(relative) < (1e-3 if dtype == torch.float32 else 2**-8)


def test_tail_bucket_where_one_minus_the_sum_is_nothing() -> None:
    """Student tails of 1e-4, 1e-8 and e**-200: the mass there is summed, not what is left of 1."""
    gap_N = torch.tensor([12.0, 21.0, 200.0])
    logits_NV = torch.zeros(3, 40) - gap_N.unsqueeze(1)
    logits_NV[:, :4] = torch.tensor([1.0, 0.5, 0.0, -0.5])
    targets = make_targets([4, 4, 4], 40, torch.Generator().manual_seed(0), 0.9, torch.arange(4).repeat(3))
    labels_N, weight_N = torch.tensor([0, 20, 20]), torch.ones(3)
    loss, gradient, kds, _ = truth(logits_NV, targets, labels_N, 0.3, "tail_bucket", weight_N)
    out, got = run(logits_NV, targets, labels_N, alpha=0.3, missing="tail_bucket", row_weights_N=weight_N)
    assert out.kd_N.tolist() == pytest.approx(kds, rel=1e-6)
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert torch.allclose(got.double(), gradient, rtol=1e-5, atol=1e-8)


def test_masked_vocabulary_and_zero_weights() -> None:
    """-inf logits (ids beyond the teacher's) get no gradient; an entry of weight 0 there costs nothing: 0 log 0 = 0."""
    logits_NV, _, labels_N, weight_N = problem(rows=4, vocabulary=30)
    logits_NV[:, 25:] = -math.inf
    labels_N = labels_N % 25
    targets = make_targets([3] * 4, 25, torch.Generator().manual_seed(0), ids=torch.tensor([0, 5, 27]).repeat(4))
    targets.weights[2::3] = 0.0
    for missing in MISSING_MASS:
        narrow = SparseTargets(
            torch.arange(5) * 2, targets.ids[targets.ids < 25], targets.weights[targets.ids < 25], torch.zeros(4), torch.zeros(4)
        )  # fmt: skip
        _, gradient, kds, _ = truth(logits_NV[:, :25], narrow, labels_N, 0.3, missing, weight_N)
        out, got = run(logits_NV, targets, labels_N, alpha=0.3, missing=missing, row_weights_N=weight_N)
        assert out.kd_N.tolist() == pytest.approx(kds, rel=1e-5)
        assert torch.allclose(got[:, :25].double(), gradient, rtol=1e-5, atol=1e-7)
        assert bool((got[:, 25:] == 0).all())


def test_what_alpha_leaves_out_may_be_infinite() -> None:
    """A label the student excludes costs nothing at alpha 0, a target it excludes nothing at alpha 1."""
    logits_NV, targets, labels_N, _ = problem(rows=3, vocabulary=30)
    ce, kd = logits_NV.clone(), logits_NV.clone()
    labels_N[0] = next(i for i in range(30) if i not in targets.ids[: targets.offsets[1]])
    kd[0, labels_N[0]] = -math.inf
    ce[0, targets.ids[0].long()] = -math.inf
    for z, alpha in ((kd, 0.0), (ce, 1.0)):
        out, got = run(z, targets, labels_N, alpha=alpha)
        assert math.isfinite(float(out.loss.detach()))
        assert bool(got.isfinite().all())
        assert math.isinf(float((out.ce_N if alpha == 0 else out.kd_N)[0]))


def test_alpha_one_is_cross_entropy_with_or_without_targets() -> None:
    logits_NV, targets, labels_N, _ = problem()
    z = logits_NV.clone().requires_grad_()
    loss = F.cross_entropy(z, labels_N)
    loss.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    for given_targets in (targets, None):
        out, got = run(logits_NV, given_targets, labels_N, alpha=1.0)
        assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
        assert torch.allclose(got, z.grad, rtol=1e-5, atol=1e-8)


def test_empty_rows_contribute_cross_entropy_alone() -> None:
    logits_NV, _, labels_N, _ = problem(rows=4)
    empty = make_targets([0] * 4, 93, torch.Generator())
    for missing in MISSING_MASS:
        out, got = run(logits_NV, empty, labels_N, alpha=0.3, missing=missing)
        assert out.kd_N.tolist() == [0.0] * 4
        assert float(out.loss.detach()) == pytest.approx(0.3 * float(F.cross_entropy(logits_NV, labels_N)), rel=1e-6)
        _, ce = run(logits_NV, None, labels_N, alpha=1.0)
        assert torch.allclose(got, 0.3 * ce, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("missing", MISSING_MASS)
def test_support_of_the_whole_vocabulary(missing: str) -> None:
    """There is no tail then, whatever the weights sum to."""
    generator = torch.Generator().manual_seed(2)
    logits_NV, labels_N, weight_N = torch.randn(3, 20, generator=generator), torch.tensor([0, 7, 19]), torch.ones(3)
    targets = make_targets([20] * 3, 20, generator, 0.95)
    _, gradient, kds, _ = truth(logits_NV, targets, labels_N, 0.3, missing, weight_N)
    out, got = run(logits_NV, targets, labels_N, alpha=0.3, missing=missing, row_weights_N=weight_N)
    assert out.kd_N.tolist() == pytest.approx(kds, rel=1e-5)
    assert torch.allclose(got.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_learn(inplace: bool) -> None:
    """All rows ignored, or none at all: loss 0, gradient 0, no NaN; what stands in an ignored row does not matter."""
    logits_NV, targets, labels_N, weight_N = problem()
    out, got = run(logits_NV, targets, torch.full_like(labels_N, -100), alpha=0.3, inplace=inplace)
    assert (float(out.loss.detach()), float(got.abs().max())) == (0.0, 0.0)
    logits_NV[2:4] = math.nan  # the ignored row and the weightless one
    logits_NV[3, 5] = math.inf
    out, got = run(logits_NV, targets, labels_N, alpha=0.3, row_weights_N=weight_N, inplace=inplace)
    assert math.isfinite(float(out.loss.detach()))
    assert bool(got.isfinite().all())
    assert bool((got[2:4] == 0).all())
    none = make_targets([], 93, torch.Generator())
    out, got = run(torch.zeros(0, 93), none, torch.zeros(0, dtype=torch.int64), alpha=0.3, inplace=inplace)
    assert (float(out.loss.detach()), got.shape, out.kd_N.shape) == (0.0, (0, 93), (0,))


def test_row_weights() -> None:
    """The default is the mean over labelled rows; weights act on loss and gradient alike, row by row."""
    logits_NV, targets, labels_N, weight_N = problem()
    labelled_N = (labels_N != -100).float()
    default, gradient = run(logits_NV, targets, labels_N, alpha=0.3)
    out, same = run(logits_NV, targets, labels_N, alpha=0.3, row_weights_N=labelled_N / labelled_N.sum())
    assert float(out.loss.detach()) == float(default.loss.detach())
    assert torch.equal(same, gradient)
    out, got = run(logits_NV, targets, labels_N, alpha=0.3, row_weights_N=weight_N)
    per_row_N = 0.7 * default.kd_N + 0.3 * default.ce_N
    assert float(out.loss.detach()) == pytest.approx(float((weight_N * per_row_N).sum()), rel=1e-6)
    scale_N1 = (weight_N * labelled_N.sum() * labelled_N).unsqueeze(1)
    assert torch.allclose(got, gradient * scale_N1, rtol=1e-5, atol=1e-8)


# ---- ownership of the logits ---------------------------------------------------------------------------------------------


def test_without_inplace_logits_are_left_alone() -> None:
    """float32 included, where `.float()` is no copy; for views and leaves alike."""
    logits_NV, targets, labels_N, _ = problem()
    before = logits_NV.clone()
    for missing in MISSING_MASS:
        out = sparse_kd_loss(logits_NV.requires_grad_(), targets, labels_N, alpha=0.3, missing=missing)
        out.loss.backward()  # type: ignore[no-untyped-call]
        assert torch.equal(logits_NV.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_heads_on_the_same_logits(dtype: torch.dtype) -> None:
    """Another loss on the same logits, before and after, sees what it should; gradients add up."""
    logits_NV, targets, labels_N, _ = problem()
    logits_NV = logits_NV.to(dtype)
    _, one = run(logits_NV, targets, labels_N, alpha=0.3)
    z = logits_NV.clone().requires_grad_()
    shared = z * 1.0
    before = shared.float().square().sum()
    out = sparse_kd_loss(shared, targets, labels_N, alpha=0.3)
    after = shared.float().square().sum()
    (0.5 * before + out.loss + 0.5 * after).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    wanted = one.double() + 2 * logits_NV.double()
    assert torch.allclose(z.grad.double(), wanted, rtol=1e-6 if dtype == torch.float32 else 2**-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_is_the_same_gradient_in_the_logits_memory(dtype: torch.dtype) -> None:
    logits_NV, targets, labels_N, _ = problem(mass=0.8)
    logits_NV = logits_NV.to(dtype)
    for missing in MISSING_MASS:
        _, wanted = run(logits_NV, targets, labels_N, alpha=0.3, missing=missing)
        z = logits_NV.clone().requires_grad_()
        given_up = z * 1.0
        loss = sparse_kd_loss(given_up, targets, labels_N, alpha=0.3, missing=missing, inplace=True).loss
        assert torch.equal(given_up.detach(), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        assert z.grad is not None
        assert torch.equal(z.grad, wanted)


def test_inplace_that_an_earlier_operation_cannot_bear_raises() -> None:
    logits_NV, targets, labels_N, _ = problem()
    z = logits_NV.clone().requires_grad_()
    shared = z * 1.0
    other = shared.square().sum()  # saves `shared`
    loss = sparse_kd_loss(shared, targets, labels_N, alpha=0.3, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()  # type: ignore[no-untyped-call]


def test_without_gradient_the_loss_is_right_and_inplace_touches_nothing() -> None:
    logits_NV, targets, labels_N, _ = problem()
    with_gradient, _ = run(logits_NV, targets, labels_N, alpha=0.3)
    before = logits_NV.clone()
    frozen = sparse_kd_loss(logits_NV, targets, labels_N, alpha=0.3, inplace=True)
    with torch.no_grad():
        evaluated = sparse_kd_loss(logits_NV.requires_grad_(), targets, labels_N, alpha=0.3, inplace=True)
    for out in (frozen, evaluated):
        assert not out.loss.requires_grad
        assert torch.equal(out.loss, with_gradient.loss.detach())
        assert torch.equal(out.kd_N, with_gradient.kd_N)
    assert torch.equal(logits_NV.detach(), before)


def test_backward_twice_and_second_derivative() -> None:
    logits_NV, targets, labels_N, _ = problem()
    z = logits_NV.requires_grad_()
    loss = sparse_kd_loss(z, targets, labels_N, alpha=0.3).loss
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, z)
    assert torch.equal(second, 2 * kept)
    assert torch.equal(first, kept)
    loss = sparse_kd_loss(z, targets, labels_N, alpha=0.3).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_non_contiguous_logits_and_sliced_labels(dtype: torch.dtype, inplace: bool) -> None:
    logits_NV, targets, labels_N, _ = problem()
    logits_NV = logits_NV.to(dtype)
    wanted, gradient = run(logits_NV, targets, labels_N, alpha=0.3)
    odd_labels_N = torch.cat((torch.zeros(1, dtype=torch.int64), labels_N))[1:]
    wide = torch.zeros(9, 100, dtype=dtype)
    for view in (wide[:, 3:96].copy_(logits_NV), logits_NV.t().contiguous().t()):
        z = view.detach().requires_grad_()
        out = sparse_kd_loss(z if not inplace else z.view_as(z), targets, odd_labels_N, alpha=0.3, inplace=inplace)
        (got,) = torch.autograd.grad(out.loss, z)
        assert torch.equal(out.loss, wanted.loss)
        assert torch.equal(got, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", MISSING_MASS)
def test_one_buffer_of_the_logits_size(missing: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is the only new tensor larger than a few blocks of rows."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 4_000)
    logits_NV, targets, labels_N, _ = problem(rows=64, vocabulary=2_000)
    z = logits_NV.to(dtype).requires_grad_()
    large: dict[int, int] = {}

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    if storage.nbytes() > 8_000 * 8 and storage.data_ptr() != z.untyped_storage().data_ptr():
                        large[storage.data_ptr()] = storage.nbytes()
            return result

    with Watch():  # type: ignore[no-untyped-call]
        sparse_kd_loss(z, targets, labels_N, alpha=0.3, missing=missing).loss.backward()  # type: ignore[no-untyped-call]
    assert list(large.values()) == [z.numel() * z.element_size()]


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits_NV", dict(logits_NV=torch.zeros(93))),
        ("logits_NV", dict(logits_NV=torch.zeros(9, 93, dtype=torch.int64))),
        ("labels_N", dict(labels_N=torch.zeros(8, dtype=torch.int64))),
        ("labels_N", dict(labels_N=torch.zeros(9, dtype=torch.int32))),
        ("labels_N", dict(labels_N=torch.full((9,), 93))),
        ("labels_N", dict(labels_N=torch.full((9,), -1))),
        ("alpha", dict(alpha=1.1)),
        ("alpha", dict(alpha=math.nan)),
        ("alpha", dict(targets=None, alpha=0.5)),
        ("missing", dict(missing="ghost")),
        ("targets", dict(targets=make_targets([1, 2], 93, torch.Generator()))),
        ("targets.ids", dict(targets=make_targets([1] * 9, 93, torch.Generator(), ids=torch.full((9,), 93)))),
        ("targets.ids", dict(targets=make_targets([1] * 9, 93, torch.Generator(), ids=torch.full((9,), -1)))),
        ("targets.ids", dict(targets=make_targets([2] * 9, 93, torch.Generator(), ids=torch.tensor([7, 8] * 8 + [7, 7])))),
        ("row_weights_N", dict(row_weights_N=torch.ones(9, dtype=torch.int64))),
        ("row_weights_N", dict(row_weights_N=torch.ones(8))),
        ("row_weights_N", dict(row_weights_N=torch.ones(9, requires_grad=True))),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name: str, changes: dict[str, Any]) -> None:
    logits_NV, targets, labels_N, _ = problem()
    arguments: dict[str, Any] = dict(logits_NV=logits_NV, targets=targets, labels_N=labels_N, alpha=0.5)
    sparse_kd_loss(**arguments)
    with pytest.raises(ValueError, match=f"`{name}`"):
        sparse_kd_loss(**{**arguments, **changes})
