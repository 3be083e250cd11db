"""Every divergence under every convention, at a temperature and split: against its textbook definition in dense float64.

Shapes: `N` rows, `V` vocabulary, `K` entries of a row, `E` entries.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.kernels.sample import sample
from stillroom.kernels.sparse_kd import DIVERGENCES, MISSING_MASS, SparseKDOutput, TargetSplit, sparse_kd_loss
from stillroom.kernels.targets import SparseTargets, tempered

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
BETA, SKEW = 0.3, 0.2


def teacher_and_student(rows: int, vocabulary: int, seed: int = 0, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float64 log-probabilities of a teacher and logits of a student that has learnt something of it."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NV = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 3
    noise_NV = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * gap
    return teacher_NV.log_softmax(1), (teacher_NV + noise_NV).float()


def top_k(logp_NV: Tensor, kept: int, labels_N: Tensor | None = None) -> SparseTargets:
    """The K likeliest ids of every row with their probabilities."""
    rows = len(logp_NV)
    logp_NK, ids_NK = logp_NV.topk(kept, 1)
    label_logp_N = logp_NV.gather(1, (torch.zeros(rows, dtype=torch.int64) if labels_N is None else labels_N)[:, None])
    return SparseTargets(
        torch.arange(rows + 1) * kept, ids_NK.flatten().int(), logp_NK.exp().flatten().float(), label_logp_N[:, 0].float(),
        torch.zeros(rows), logp_NK.flatten().float(),
    )  # fmt: skip


def textbook(p: Tensor, logq: Tensor, name: str) -> Tensor:
    """Divergence of two distributions in full, `[..., V]` to `[...]`; where p is 0 its limit, but 1 nat per q for reverse KL."""
    q = logq.exp()
    if name == "forward_kl":
        return (torch.xlogy(p, p) - torch.where(p > 0, p * logq, 0.0)).sum(-1)
    if name == "reverse_kl":
        return torch.where(p > 0, q * (logq - torch.where(p > 0, p, 1.0).log()), q).sum(-1)
    if name == "jsd":
        m = BETA * p + (1 - BETA) * q
        return (BETA * (torch.xlogy(p, p) - torch.xlogy(p, m)) + (1 - BETA) * q * (logq - m.log())).sum(-1)
    if name == "skew_kl":
        return (torch.xlogy(p, p) - torch.xlogy(p, SKEW * p + (1 - SKEW) * q)).sum(-1)
    if name == "skew_reverse_kl":
        return (q * (logq - ((1 - SKEW) * p + SKEW * q).log())).sum(-1)
    return 1 - torch.minimum(p, q).sum(-1)  # for distributions: half the sum of |p - q|


def dense(z_NV: Tensor, targets: SparseTargets, name: str, missing: str, temperature: float) -> Tensor:
    """KD of every row by the definitions of `docs/losses.md`, in the dtype of the logits, for targets with w = p."""
    logq_NV = (z_NV / temperature).log_softmax(1)
    losses = []
    for n in range(targets.rows):
        entries = slice(int(targets.offsets[n]), int(targets.offsets[n + 1]))
        ids, w = targets.ids[entries].long(), targets.weights[entries].to(z_NV.dtype)
        if missing.startswith("renormalise"):
            w = w / w.sum()
        if missing == "renormalise_both":
            p, logq = w, (z_NV[n, ids] / temperature).log_softmax(0)
        elif missing == "tail_bucket" and len(ids) < z_NV.shape[1]:
            tail = torch.ones(z_NV.shape[1], dtype=torch.bool).index_fill_(0, ids, False)
            p = torch.cat((w, (1 - w.sum()).clamp_min(0)[None]))
            logq = torch.cat((logq_NV[n, ids], logq_NV[n][tail].logsumexp(0)[None]))
        else:
            p, logq = torch.zeros_like(logq_NV[n]).index_put((ids,), w), logq_NV[n]
        losses.append(temperature**2 * textbook(p, logq, name))
    return torch.stack(losses)


def run(
    logits_NV: Tensor, targets: SparseTargets, labels_N: Tensor, device: str = "cpu", impl: str = "auto", **options: Any
) -> tuple[SparseKDOutput, Tensor]:
    """Output and gradient on a device, both back on the CPU; row weights 1 unless given."""
    z = logits_NV.to(device).clone().requires_grad_()
    options.setdefault("row_weights_N", torch.ones(len(labels_N), device=device))
    out = sparse_kd_loss(z, targets.to(device), labels_N.to(device), beta=BETA, skew=SKEW, impl=impl, **options)
    (gradient,) = torch.autograd.grad(out.loss.sum(), z)
    return SparseKDOutput(out.loss.detach().cpu(), out.kd_N.cpu(), out.ce_N.cpu()), gradient.cpu()


def assert_within_budget(name: str, ours: Tensor, eager: Tensor, exact: Tensor, roundings: float = 1) -> None:
    """Error at most twice that of eager PyTorch, and what the last rounding may cost."""
    mine, its = float((ours - exact).abs().max()), float((eager - exact).abs().max())
    unit = roundings * float(torch.finfo(ours.dtype).eps) * float(exact.abs().max()) / 2
    assert mine <= 2 * its + unit, f"{name}: ours {mine:.2e}, eager {its:.2e}, unit {unit:.2e}"


def budget(
    logits_NV: Tensor,
    targets: SparseTargets,
    labels_N: Tensor,
    name: str,
    missing: str,
    temperature: float,
    **place: Any,
) -> None:
    """Value and gradient of the sparse loss against float64, with the error of eager PyTorch as the measure."""
    out, got = run(
        logits_NV, targets, labels_N, divergence=name, missing=missing, temperature=temperature, alpha=0.3, **place
    )
    found = []
    for dtype in (torch.float64, torch.float32):
        z = logits_NV.clone().requires_grad_() if dtype == torch.float32 else logits_NV.double().requires_grad_()
        wide_NV = z.to(dtype)
        kd_N = dense(wide_NV, targets, name, missing, temperature)
        ce_N = torch.nn.functional.cross_entropy(wide_NV, labels_N, reduction="none")
        (0.7 * kd_N + 0.3 * ce_N).sum().backward()
        assert z.grad is not None
        found.append((kd_N.detach(), ce_N.detach(), z.grad))
    (kd_N, ce_N, gradient), (eager_kd_N, eager_ce_N, eager_gradient) = found
    # a value is a sum of terms as large as its logarithms: those, not the sum, are what was rounded
    assert_within_budget("KD", out.kd_N, eager_kd_N, kd_N, 8 * temperature**2)
    assert_within_budget("CE", out.ce_N, eager_ce_N, ce_N)
    # an entry's float32 gradient went through four roundings (log p, log q, their difference, its exponential), and the largest
    # of eager's few errors may be a lucky one; half precision rounds once, after all that
    assert_within_budget("gradient", got, eager_gradient, gradient, 4 if got.dtype == torch.float32 else 1)


@backends
@pytest.mark.parametrize("missing", MISSING_MASS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_error_budget(name: str, missing: str, device: str, impl: str) -> None:
    logp_NV, logits_NV = teacher_and_student(3, 37)
    labels_N = torch.tensor([0, 5, 36])
    for kept, temperature, dtype in ((12, 1.0, torch.float32), (30, 2.5, torch.bfloat16)):
        targets = top_k(logp_NV, kept)
        budget(logits_NV.to(dtype), targets, labels_N, name, missing, temperature, device=device, impl=impl)


@backends
@pytest.mark.parametrize("vocabulary", [1_000, 32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize(
    ("name", "missing", "temperature", "dtype"),
    [
        ("forward_kl", "truncate", 1.0, torch.bfloat16),
        ("forward_kl", "tail_bucket", 2.0, torch.float32),
        ("jsd", "tail_bucket", 1.0, torch.bfloat16),
        ("skew_reverse_kl", "renormalise_both", 1.7, torch.float32),
    ],
)
def test_error_budget_at_the_vocabulary_of_a_real_model(
    name: str, missing: str, temperature: float, dtype: torch.dtype, vocabulary: int, device: str, impl: str
) -> None:
    logp_NV, logits_NV = teacher_and_student(2, vocabulary)
    labels_N = torch.tensor([0, vocabulary - 1])
    budget(logits_NV.to(dtype), top_k(logp_NV, 50), labels_N, name, missing, temperature, device=device, impl=impl)


@pytest.mark.parametrize("missing", MISSING_MASS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name: str, missing: str) -> None:
    logp_NV, logits_NV = teacher_and_student(3, 7)
    targets, labels_N = top_k(logp_NV, 4), torch.tensor([0, -100, 3])

    def loss(z: Tensor) -> Tensor:
        return sparse_kd_loss(
            z, targets, labels_N, divergence=name, missing=missing, beta=BETA, skew=SKEW, temperature=2.0, alpha=0.4,
            reduction="none",
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, logits_NV.double().requires_grad_())


@pytest.mark.parametrize("missing", MISSING_MASS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_reaches_the_gradient_and_not_only_the_reported_value(name: str, missing: str) -> None:
    """Finite differences of the number that is logged, default row weights included."""
    logp_NV, logits_NV = teacher_and_student(4, 50)
    targets, labels_N, z = top_k(logp_NV, 9), torch.tensor([0, 49, -100, 7]), logits_NV.double()
    options: dict[str, Any] = dict(divergence=name, missing=missing, temperature=3.0, alpha=0.2, row_weights_N=None)
    _, gradient = run(z, targets, labels_N, **options)
    step_NV = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-5
    slope = (
        run(z + step_NV, targets, labels_N, **options)[0].loss - run(z - step_NV, targets, labels_N, **options)[0].loss
    )
    assert float(slope) == pytest.approx(2 * float((gradient * step_NV).sum()), rel=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_whole_vocabulary_is_the_dense_divergence_whatever_the_convention(name: str) -> None:
    logp_NV, logits_NV = teacher_and_student(5, 40)
    labels_N, z = torch.zeros(5, dtype=torch.int64), logits_NV.double().requires_grad_()
    kd_N = 4.0 * textbook(logp_NV.exp(), (z / 2.0).log_softmax(1), name)
    (wanted,) = torch.autograd.grad(kd_N.sum(), z)
    for missing in MISSING_MASS:
        out, got = run(
            logits_NV.double(), top_k(logp_NV, 40), labels_N, divergence=name, missing=missing, temperature=2.0
        )
        # weights and log-probabilities are float32
        assert torch.allclose(out.kd_N, kd_N.detach(), rtol=2e-6, atol=2e-6), missing
        assert torch.allclose(got, wanted, rtol=2e-6, atol=2e-6), missing


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), kept=st.integers(1, 30), gap=st.sampled_from([0.0, 0.5, 3.0]))
def test_top_k_with_a_tail_bucket_is_never_above_the_dense_divergence(seed: int, kept: int, gap: float) -> None:
    """Merging ids into one bucket loses information: the data-processing inequality, for each of them."""
    logp_NV, logits_NV = teacher_and_student(2, 30, seed, gap)
    z, labels_N = logits_NV.double(), torch.zeros(2, dtype=torch.int64)
    for name in DIVERGENCES:
        out, _ = run(z, top_k(logp_NV, kept), labels_N, divergence=name, missing="tail_bucket")
        full_N = textbook(logp_NV.exp(), z.log_softmax(1), name)
        assert bool((out.kd_N <= full_N + 1e-6).all()), name
        assert bool((out.kd_N >= -1e-6).all()), name


@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_draw_has_the_dense_value_and_gradient_in_expectation(name: str) -> None:
    """Exactly: one row for each id the draw can give, weight 1 and the id's log p, averaged under p."""
    logp_NV, logits_NV = teacher_and_student(1, 25)
    z, p_V = logits_NV.double(), logp_NV[0].exp()
    drawn = SparseTargets(
        torch.arange(26), torch.arange(25, dtype=torch.int32), torch.ones(25), torch.zeros(25), torch.zeros(25),
        logp_NV[0].float(),
    )  # fmt: skip
    out, got = run(z.expand(25, 25), drawn, torch.zeros(25, dtype=torch.int64), divergence=name)
    leaf = z.clone().requires_grad_()
    value = textbook(logp_NV.exp(), leaf.log_softmax(1), name)
    (wanted,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.allclose(p_V @ got, wanted[0], rtol=1e-5, atol=1e-6)
    if (
        name != "forward_kl"
    ):  # its value says log w, which for one draw is 0: short of the teacher's entropy, a constant
        assert float(p_V @ out.kd_N) == pytest.approx(float(value.detach()), rel=1e-5)
    else:
        entropy = -float((p_V * logp_NV[0]).sum())
        assert float(p_V @ out.kd_N) - entropy == pytest.approx(float(value.detach()), rel=1e-5)


def test_sampled_forward_kl_has_the_dense_gradient() -> None:
    """R rows of N draws: the mean gradient's j-th deviation is p_j - mean weight, of variance p_j (1 - p_j) / (N R).

    30 ids at 6 standard deviations fail by chance less than once in 10**7.
    """
    logp_NV, logits_NV = teacher_and_student(1, 30, gap=0.3)
    rows, draws = 3_000, 12
    index_N = torch.arange(rows)
    targets = sample(
        logp_NV.float().expand(rows, 30), torch.zeros(rows, dtype=torch.int64), kind="random", draws=draws, seed=1,
        sequence_N=index_N, row_N=index_N * 0,
    )  # fmt: skip
    _, got = run(logits_NV.expand(rows, 30), targets, torch.zeros(rows, dtype=torch.int64))
    p_V, q_V = logp_NV[0].exp(), logits_NV[0].double().softmax(0)
    z_V = (got.double().mean(0) - (q_V - p_V)) / (p_V * (1 - p_V) / (draws * rows)).sqrt()
    assert float(z_V.abs().max()) < 6
    assert float(z_V.square().mean()) > 0.2  # and it does scatter: it is a sample


@backends
@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"reverse_kl"}))
def test_no_nan_where_both_probabilities_underflow(name: str, device: str, impl: str) -> None:
    """Logits 100 and 1000 apart, both ways: log of a sum of exponentials must not meet log 0."""
    logits_NV = torch.tensor([[100.0, 0.0, -100.0, 1.0], [-1000.0, 0.0, 1000.0, 1.0], [0.0, -math.inf, 1.0, -90.0]])
    logp_NV = torch.tensor(
        [[-100.0, 0.0, -200.0, -math.inf], [0.0, -1000.0, -1000.0, -90.0], [-0.7, -0.7, -90.0, -60.0]]
    )
    targets = SparseTargets(
        torch.arange(4) * 4, torch.arange(4, dtype=torch.int32).repeat(3), logp_NV.exp().flatten(), torch.zeros(3),
        torch.zeros(3), logp_NV.flatten(),
    )  # fmt: skip
    labels_N = torch.tensor([0, 2, 0])
    for missing in MISSING_MASS:
        out, got = run(logits_NV, targets, labels_N, device, impl, divergence=name, missing=missing)
        assert bool(got.isfinite().all()), missing
        if name != "forward_kl":  # which is truly infinite in the last row
            assert bool(out.kd_N.isfinite().all()), missing
            q_NV, p_NV = logits_NV.double().log_softmax(1), logp_NV.double().exp()
            assert float(out.kd_N[0]) == pytest.approx(
                float(textbook(p_NV[0], q_NV[0].clamp_min(-700), name)), rel=1e-4
            )


def test_reverse_kl_on_a_truncated_head_does_not_want_mass_outside() -> None:
    """Sum of q log(q/p) over the head alone is least at q = p/e; with a nat for the rest of the student it is least at q = p."""
    logp_NV, _ = teacher_and_student(1, 20)
    targets = top_k(logp_NV, 5)
    _, got = run(logp_NV, targets, torch.zeros(1, dtype=torch.int64), divergence="reverse_kl")
    assert float(got.abs().max()) < 1e-6


@backends
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_mean_is_over_rows_and_not_over_entries(name: str, device: str, impl: str) -> None:
    """Entries of weight 0, as padding of a top-k record leaves them, change neither value nor gradient."""
    logp_NV, logits_NV = teacher_and_student(3, 40)
    few, labels_N = top_k(logp_NV, 6), torch.tensor([0, 3, 5])
    many = top_k(logp_NV, 12)
    many.weights.view(3, 12)[:, 6:] = 0.0
    for missing in ("truncate", "renormalise_teacher"):
        options: dict[str, Any] = dict(divergence=name, missing=missing, alpha=0.2, row_weights_N=None)
        wanted, gradient = run(logits_NV, few, labels_N, device, impl, **options)
        out, got = run(logits_NV, many, labels_N, device, impl, **options)
        assert float(out.loss) == pytest.approx(float(wanted.loss), rel=1e-6)
        assert torch.allclose(got, gradient, rtol=1e-5, atol=1e-8)


# ---- temperature of the targets --------------------------------------------------------------------------------------


def test_tempered_targets_of_the_whole_vocabulary_are_exact() -> None:
    logp_NV, _ = teacher_and_student(3, 30)
    labels_N = torch.tensor([0, 3, 29])
    for temperature in (0.5, 1.0, 4.0):
        wanted_NV = (logp_NV / temperature).log_softmax(1)
        got = tempered(top_k(logp_NV, 30, labels_N), temperature)
        assert got.logp is not None
        wanted_E = wanted_NV[got.entry_rows(), got.ids.long()]
        assert torch.allclose(got.logp.double(), wanted_E, atol=1e-5)
        assert torch.allclose(got.weights.double(), wanted_E.exp(), rtol=1e-5)
        assert torch.allclose(got.label_logp.double(), wanted_NV[torch.arange(3), labels_N], atol=1e-5)
        assert torch.allclose(got.entropy.double(), -(wanted_NV.exp() * wanted_NV).sum(1), atol=1e-5)


def test_bias_of_tempered_draws_falls_as_one_over_their_number() -> None:
    """Two ids, p = (0.8, 0.2), T = 2: the expected weight by enumeration of all counts, N = 20 against N = 80."""
    logp = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    exact = float((logp / 2).softmax(0)[0])
    bias = []
    for draws in (20, 80):
        count = torch.arange(draws + 1, dtype=torch.float64)
        chance = torch.distributions.Binomial(draws, torch.tensor(0.8, dtype=torch.float64)).log_prob(count).exp()
        weights = torch.stack((count / draws, 1 - count / draws), 1).flatten().float()
        targets = SparseTargets(
            torch.arange(draws + 2) * 2, torch.tensor([0, 1], dtype=torch.int32).repeat(draws + 1), weights,
            torch.zeros(draws + 1), torch.zeros(draws + 1), logp.float().repeat(draws + 1),
        )  # fmt: skip
        bias.append(float(chance @ tempered(targets, 2.0).weights[::2].double()) - exact)
    assert bias[0] / bias[1] == pytest.approx(4.0, rel=0.2)


def test_tempered_refuses_counts_and_strange_temperatures() -> None:
    logp_NV, _ = teacher_and_student(1, 5)
    targets = top_k(logp_NV, 3)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`temperature`"):
            tempered(targets, temperature)
    bare = SparseTargets(targets.offsets, targets.ids, targets.weights, targets.label_logp, targets.entropy)
    with pytest.raises(ValueError, match="logp"):
        tempered(bare, 2.0)


# ---- target / non-target split ---------------------------------------------------------------------------------------


def split_truth(
    z_NV: Tensor, targets: SparseTargets, labels_N: Tensor, split: TargetSplit, missing: str, temperature: float
) -> Tensor:
    """tkd * TKD + dkd * DKD by its definition, row by row."""
    logq_NV, losses = (z_NV / temperature).log_softmax(1), []
    for n, g in enumerate(labels_N.tolist()):
        entries = slice(int(targets.offsets[n]), int(targets.offsets[n + 1]))
        ids, w = targets.ids[entries].long(), targets.weights[entries].to(z_NV.dtype)
        w, ids = w[ids != g], ids[ids != g]
        log_pg = targets.label_logp[n].to(z_NV.dtype)
        rest = torch.ones(z_NV.shape[1], dtype=torch.bool)
        rest[g] = False
        log_u = logq_NV[n][rest].logsumexp(0)
        tkd = log_pg.exp() * (log_pg - logq_NV[n, g]) - torch.expm1(log_pg) * ((-torch.expm1(log_pg)).log() - log_u)
        w = w / (w.sum() if missing == "renormalise_teacher" else -torch.expm1(log_pg))
        dkd = (torch.xlogy(w, w) - w * (logq_NV[n, ids] - log_u)).sum()
        if missing == "tail_bucket" and len(ids) + 1 < z_NV.shape[1]:
            tail, mass = rest.index_fill(0, ids, False), (1 - w.sum()).clamp_min(0)
            dkd = dkd + torch.xlogy(mass, mass) - mass * (logq_NV[n][tail].logsumexp(0) - log_u)
        losses.append(temperature**2 * (split.tkd_N[n] * tkd + split.dkd_N[n] * dkd))
    return torch.stack(losses)


@backends
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("missing", ["truncate", "renormalise_teacher", "tail_bucket"])
def test_split_is_its_definition(missing: str, temperature: float, device: str, impl: str) -> None:
    """Labels inside and outside the support, likely and unlikely."""
    logp_NV, logits_NV = teacher_and_student(6, 45)
    labels_N = torch.cat((logp_NV[:3].argmax(1), logp_NV[3:].argmin(1)))
    split = TargetSplit(
        torch.tensor([0.2, 1, 2, 0, 1, 1.5]).to(device), torch.tensor([1.0, 1, 0, 3, 0.5, 1]).to(device)
    )
    targets = top_k(logp_NV, 8, labels_N)
    z = logits_NV.double().requires_grad_()
    kd_N = split_truth(z, targets, labels_N, TargetSplit(split.tkd_N.cpu(), split.dkd_N.cpu()), missing, temperature)
    ce_N = torch.nn.functional.cross_entropy(z, labels_N, reduction="none")
    (wanted,) = torch.autograd.grad((0.6 * kd_N + 0.4 * ce_N).sum(), z)
    out, got = run(
        logits_NV, targets, labels_N, device, impl, missing=missing, temperature=temperature, alpha=0.4, split=split
    )
    assert torch.allclose(out.kd_N.double(), kd_N.detach(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(got.double(), wanted, rtol=2e-5, atol=1e-6)


@backends
def test_split_with_the_teachers_doubt_as_factor_is_the_forward_kl(device: str, impl: str) -> None:
    """KL = TKD + (1 - p_g) DKD, value and gradient, on the whole vocabulary and on a head with its tail in a bucket."""
    logp_NV, logits_NV = teacher_and_student(5, 31)
    labels_N = logp_NV.argmax(1)  # in every support, so that the buckets are the same
    for kept, missing in ((31, "truncate"), (31, "tail_bucket"), (6, "tail_bucket"), (6, "truncate")):
        targets = top_k(logp_NV, kept, labels_N)
        split = TargetSplit(torch.ones(5).to(device), -torch.expm1(targets.label_logp).to(device))
        plain, gradient = run(logits_NV, targets, labels_N, device, impl, missing=missing)
        out, got = run(logits_NV, targets, labels_N, device, impl, missing=missing, split=split)
        if (kept, missing) != (6, "truncate"):  # where TKD alone keeps the missing mass
            assert torch.allclose(out.kd_N, plain.kd_N, rtol=1e-4, atol=1e-6)
            assert torch.allclose(got, gradient, rtol=1e-4, atol=1e-6)
        else:
            assert bool((out.kd_N != plain.kd_N).all())


def test_split_gradcheck_and_certain_teacher() -> None:
    logp_NV, logits_NV = teacher_and_student(3, 7)
    labels_N = torch.tensor([0, -100, 3])
    targets = top_k(logp_NV, 4, labels_N.clamp_min(0))
    split = TargetSplit(torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.3]))
    for missing in ("truncate", "renormalise_teacher", "tail_bucket"):

        def loss(z: Tensor, missing: str = missing) -> Tensor:
            return sparse_kd_loss(z, targets, labels_N, missing=missing, temperature=1.5, alpha=0.2, split=split).loss

        assert torch.autograd.gradcheck(loss, logits_NV.double().requires_grad_())
    zero_N, id_E = torch.zeros(1), torch.tensor([2], dtype=torch.int32)
    certain = SparseTargets(torch.tensor([0, 1]), id_E, torch.ones(1), zero_N, zero_N)
    ones = TargetSplit(torch.ones(1), torch.ones(1))
    out, got = run(logits_NV[:1], certain, torch.tensor([2]), split=ones)  # p_g = 1: there is no rest to distil
    assert float(out.kd_N) == pytest.approx(float(-logits_NV[0].double().log_softmax(0)[2]), rel=1e-5)
    assert bool(got.isfinite().all())


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(argument: str, targets: SparseTargets, **options: Any) -> str:
    labels_N = torch.zeros(targets.rows, dtype=torch.int64)
    with pytest.raises(ValueError, match=argument) as caught:
        sparse_kd_loss(torch.zeros(targets.rows, 9), targets, labels_N, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"forward_kl"}))
def test_a_divergence_the_cache_cannot_carry_is_refused(name: str) -> None:
    targets = top_k(teacher_and_student(2, 9)[0], 3)
    bare = SparseTargets(targets.offsets, targets.ids, targets.weights, targets.label_logp, targets.entropy)
    assert "keep_logp" in refused("`divergence`", bare, divergence=name)
    assert targets.logp is not None
    targets.logp[4] = math.nan
    assert "keep_logp" in refused("`targets.logp`", targets, divergence=name)
    sparse_kd_loss(torch.zeros(2, 9), targets, torch.zeros(2, dtype=torch.int64), divergence=name, check=False)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("`divergence`", dict(divergence="kl")),
        ("`beta`", dict(divergence="jsd", beta=1.0)),
        ("`skew`", dict(divergence="skew_kl", skew=0.0)),
        ("`temperature`", dict(temperature=0.0)),
        ("`temperature`", dict(temperature=math.nan)),
        ("`reduction`", dict(reduction="mean")),
        ("`impl`", dict(impl="cuda")),
        ("`split`", dict(split=TargetSplit(torch.ones(2), torch.ones(2)), divergence="jsd")),
        ("`split`", dict(split=TargetSplit(torch.ones(2), torch.ones(2)), missing="renormalise_both")),
        ("`split.dkd_N`", dict(split=TargetSplit(torch.ones(2), torch.ones(3)))),
        ("`row_weights_N`", dict(row_weights_N=torch.tensor([1.0, math.nan]))),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(argument: str, options: dict[str, Any]) -> None:
    refused(argument, top_k(teacher_and_student(2, 9)[0], 3), **options)


def test_targets_that_make_no_sense() -> None:
    for name, change in (
        ("`targets.ids` came with an id twice in row 1", dict(ids=torch.tensor([0, 1, 2, 4, 3, 4], dtype=torch.int32))),
        ("`targets.ids`", dict(ids=torch.tensor([0, 1, 2, 4, 3, 9], dtype=torch.int32))),
        ("`targets.weights`", dict(weights=torch.tensor([0.1, 0.2, math.nan, 0.1, 0.2, 0.3]))),
        ("`targets.weights`", dict(weights=torch.tensor([0.1, 0.2, -0.1, 0.1, 0.2, 0.3]))),
    ):
        given_targets = top_k(teacher_and_student(2, 9)[0], 3)
        fields = {field: getattr(given_targets, field) for field in given_targets.__dataclass_fields__}
        refused(name, SparseTargets(**{**fields, **change}))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_everything_and_its_example_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    for name in (*DIVERGENCES, *MISSING_MASS):
        assert f"`{name}`" in page, name
    space: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], space)
    assert math.isfinite(float(space["out"].loss.detach()))
    assert space["logits_NV"].grad is not None
