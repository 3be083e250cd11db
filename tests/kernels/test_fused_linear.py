"""The fused head: against `sparse_kd_loss` on materialised logits, and on the mistakes others have made.

Shapes: `N` rows, `V` vocabulary, `D` width, `E` entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.kernels.fused_linear import fused_linear_sparse_kd, gemm
from stillroom.kernels.sparse_kd import SparseKDOutput, TargetSplit, sparse_kd_loss
from stillroom.kernels.targets import SparseTargets

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@dataclass
class Case:
    """Arguments of a loss."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor
    targets: SparseTargets
    labels_N: Tensor
    row_weights_N: Tensor

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        return Case(
            *(x.to(device, dtype) for x in (self.hidden_ND, self.weight_VD, self.bias_V)),
            self.targets.to(device), self.labels_N.to(device), self.row_weights_N.to(device),
        )  # fmt: skip

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in (self.hidden_ND, self.weight_VD, self.bias_V)]


def case(rows: int = 23, vocabulary: int = 61, width: int = 8, kept: int = 5, seed: int = 0) -> Case:
    """Rows with and without a label, one of weight 0, one without entries; bias and logits of a model's size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    counts = torch.randint(1, min(kept, vocabulary) + 1, (rows,), generator=generator)
    counts[1:2] = 0
    ids = torch.cat(
        [torch.randperm(vocabulary, generator=generator)[: int(k)] for k in counts] + [torch.zeros(0)]
    ).int()
    weight_E = torch.rand(len(ids), generator=generator) * 0.9 / kept + 0.01
    label_logp_N = -torch.rand(rows, generator=generator) - 0.5
    targets = SparseTargets(
        torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))), ids, weight_E, label_logp_N, torch.ones(rows),
        weight_E.log(),
    )  # fmt: skip
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    row_weights_N = torch.rand(rows, generator=generator) + 0.1
    labels_N[2::4] = -100
    row_weights_N[3:4] = 0.0
    return Case(
        normal(rows, width), normal(vocabulary, width) / width**0.5 * 2, normal(vocabulary), targets, labels_N, row_weights_N
    )  # fmt: skip


def materialised(
    leaves: list[Tensor], c: Case, *, logit_scale: float = 1.0, softcap: float | None = None, vocab_size: int | None = None,
    bias: bool = True, **options: Any,
) -> SparseKDOutput:  # fmt: skip
    """The definition: all logits, and a loss of them."""
    hidden_ND, weight_VD, bias_V = leaves
    z = torch.nn.functional.linear(hidden_ND, weight_VD, bias_V if bias else None) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if vocab_size is not None:
        z = z.masked_fill(torch.arange(z.shape[1], device=z.device) >= vocab_size, -torch.inf)
    return sparse_kd_loss(z, options.pop("targets", c.targets), c.labels_N, impl="reference", **options)


def fused(leaves: list[Tensor], c: Case, *, bias: bool = True, **options: Any) -> SparseKDOutput:
    hidden_ND, weight_VD, bias_V = leaves
    targets = options.pop("targets", c.targets)
    return fused_linear_sparse_kd(hidden_ND, weight_VD, targets, c.labels_N, bias_V=bias_V if bias else None, **options)


def grads(out: SparseKDOutput, leaves: list[Tensor], upstream: float | Tensor = 3.7) -> list[Tensor]:
    return list(torch.autograd.grad((out.loss * upstream).sum(), leaves, allow_unused=True, materialize_grads=True))


LOSSES: dict[str, dict[str, Any]] = {
    "forward_kl": dict(),
    "mixed": dict(alpha=0.3),
    "cross_entropy": dict(alpha=1.0, targets=None),
    "temperature": dict(alpha=0.3, temperature=2.0),
    "renormalise_teacher": dict(missing="renormalise_teacher"),
    "renormalise_both": dict(missing="renormalise_both"),
    "tail_bucket": dict(alpha=0.1, missing="tail_bucket"),
    "reverse_kl": dict(divergence="reverse_kl", missing="tail_bucket"),
    "jsd": dict(divergence="jsd", beta=0.3, missing="tail_bucket"),
    "skew_kl": dict(divergence="skew_kl", skew=0.2, alpha=0.2),
    "skew_reverse_kl": dict(divergence="skew_reverse_kl", skew=0.2, temperature=1.5, missing="tail_bucket"),
    "tvd": dict(divergence="tvd", missing="tail_bucket"),
    "row_weights": dict(alpha=0.5, row_weights_N=True),
    "split": dict(split=True, missing="tail_bucket"),
    "softcap": dict(alpha=0.3, softcap=3.0, logit_scale=0.7),
    "softcap_and_temperature": dict(softcap=5.0, temperature=2.0, missing="tail_bucket"),
    "padded": dict(alpha=0.3, vocab_size=True, missing="tail_bucket"),
}


def chosen(name: str, c: Case) -> tuple[Case, dict[str, Any]]:
    """A loss's options; those that need tensors get them."""
    options = dict(LOSSES[name])
    if "row_weights_N" in options:
        options["row_weights_N"] = c.row_weights_N
    if "split" in options:
        options["split"] = TargetSplit(c.row_weights_N + 0.5, c.row_weights_N)
    if "vocab_size" in options:  # 9 rows of padding after the vocabulary, with numbers in them that would be noticed
        options["vocab_size"] = c.weight_VD.shape[0]
        junk_D, junk = torch.full_like(c.weight_VD[:9], 7.0), torch.full_like(c.bias_V[:9], 50.0)
        c = replace(c, weight_VD=torch.cat((c.weight_VD, junk_D)), bias_V=torch.cat((c.bias_V, junk)))
    return c, options


def worst(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).abs().max()) if exact.numel() else 0.0


# ---- the same as on materialised logits ------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize(
    "how", [dict(), dict(chunk_rows=5), dict(recompute=True, chunk_rows=7), dict(compact=False)], ids=str
)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loss_of_materialised_logits(name: str, how: dict[str, Any], device: str) -> None:
    """Loss, KD and CE by row and all three gradients, in float64."""
    c, options = chosen(name, case().to(torch.float64, device))
    leaves = c.leaves()
    wanted = materialised(leaves, c, **options)
    got = fused(leaves, c, **options, **how)
    assert float(got.loss.detach()) == pytest.approx(float(wanted.loss.detach()), rel=1e-12)
    assert got.kd_N.tolist() == pytest.approx(wanted.kd_N.tolist(), rel=1e-11)
    assert got.ce_N.tolist() == pytest.approx(wanted.ce_N.tolist(), rel=1e-11)
    assert not got.kd_N.requires_grad
    for which, ours, exact in zip(("hidden", "weight", "bias"), grads(got, leaves), grads(wanted, leaves)):
        assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-13), which


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_error_budget(name: str, dtype: torch.dtype, device: str) -> None:
    """Error against float64 at most twice that of the same dtype on materialised logits, plus the last rounding."""
    c, options = chosen(name, case(rows=96, width=32).to(dtype, device))
    exact_c = c.to(torch.float64, device)
    exact_leaves = exact_c.leaves()
    exact_out = materialised(exact_leaves, exact_c, **options)
    exact = [exact_out.loss.detach(), *grads(exact_out, exact_leaves)]
    found = []
    for function, how in ((materialised, {}), (fused, dict(chunk_rows=25))):
        leaves = c.leaves()
        out = function(leaves, c, **options, **how)
        found.append([out.loss.detach(), *grads(out, leaves)])
    for which, theirs, ours, true in zip(("loss", "hidden", "weight", "bias"), *found, exact):
        assert ours.dtype == theirs.dtype, which
        for measure in (lambda x, y: worst(x, y), lambda x, y: float((x.double() - y.double()).norm())):
            unit = float(torch.finfo(ours.dtype).eps) * measure(true, torch.zeros_like(true))
            mine, its = measure(ours, true), measure(theirs, true)
            assert mine <= 2 * its + unit, f"{which}: ours {mine:.2e}, materialised {its:.2e}, unit {unit:.2e}"


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 12), vocabulary=st.integers(1, 40), width=st.integers(1, 9), chunk=st.integers(1, 14),
    seed=st.integers(0, 999), name=st.sampled_from(["mixed", "tail_bucket", "padded", "softcap"]), recompute=st.booleans(),
    bias=st.booleans(), compact=st.booleans(),
)  # fmt: skip
def test_equals_materialised_anywhere(
    rows: int, vocabulary: int, width: int, chunk: int, seed: int, name: str, recompute: bool, bias: bool, compact: bool
) -> None:
    c, options = chosen(name, case(rows, vocabulary, width, seed=seed))
    leaves = c.leaves()
    wanted = materialised(leaves, c, bias=bias, **options)
    got = fused(leaves, c, bias=bias, recompute=recompute, compact=compact, chunk_rows=chunk, **options)
    assert torch.allclose(got.loss, wanted.loss, rtol=1e-12, atol=1e-15)
    for ours, exact in zip(grads(got, leaves), grads(wanted, leaves)):
        assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("recompute", "reduction"), [(False, "sum"), (True, "sum"), (True, "none")])
def test_gradcheck(recompute: bool, reduction: str) -> None:
    c = case(rows=5, vocabulary=7, width=3, kept=3)

    def loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        return fused_linear_sparse_kd(
            hidden_ND, weight_VD, c.targets, c.labels_N, bias_V=bias_V, alpha=0.4, missing="tail_bucket", temperature=2.0,
            softcap=4.0, logit_scale=0.5, chunk_rows=2, recompute=recompute, reduction=reduction,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, c.leaves())


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreter is off")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_loss_equals_reference(dtype: torch.dtype) -> None:
    """Same matrix products, the loss by the interpreted kernel, which gets padded strides and parts of a problem."""
    c = case().to(dtype)
    found = []
    for impl in ("reference", "triton"):
        leaves = c.leaves()
        out = fused(leaves, c, alpha=0.3, missing="tail_bucket", chunk_rows=10, impl=impl)
        found.append([out.loss.detach(), *grads(out, leaves)])
    for which, reference, triton in zip(("loss", "hidden", "weight", "bias"), *found):
        unit = 1e-5 if dtype == torch.float32 or which == "loss" else 2**-6
        assert worst(triton, reference) <= unit * float(reference.abs().max()), which


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adds", [True, False])
def test_products_added_in_float32(adds: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the GEMM, and by the way around it that older versions of PyTorch need."""
    if adds and not gemm._adds_to_wide(torch.device("cuda", 0)):
        pytest.skip("this PyTorch cannot")
    monkeypatch.setattr(gemm, "_adds_to_wide", lambda device: adds)
    monkeypatch.setattr(gemm, "BLOCK_ELEMENTS", 5_000)
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(n, m, device="cuda", generator=generator).to(dtype) for n, m in ((301, 70), (70, 64)))
    out = torch.full((301, 64), math.nan, device="cuda")
    gemm.multiply_into(out, a, b, scale=0.5)
    gemm.multiply_into(out, a, b, scale=2.0, add=True)
    assert torch.allclose(out.double(), 2.5 * a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixed", "tail_bucket", "jsd", "softcap", "padded"])
def test_triton_on_the_device_equals_reference(name: str, dtype: torch.dtype) -> None:
    c, options = chosen(name, case(rows=300, vocabulary=5_003, width=64, kept=12).to(dtype, "cuda"))
    found = []
    for impl in ("reference", "triton"):
        leaves = c.leaves()
        out = fused(leaves, c, chunk_rows=100, impl=impl, **options)
        found.append([out.loss.detach(), *grads(out, leaves)])
    for which, reference, triton in zip(("loss", "hidden", "weight", "bias"), *found):
        unit = 1e-5 if dtype == torch.float32 or which == "loss" else 2**-6
        assert worst(triton, reference) <= unit * float(reference.abs().max()), which


# ---- the mistakes of others ------------------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_accumulated_in_half_precision(dtype: torch.dtype, device: str) -> None:
    """The error does not grow with the number of chunks (in half precision it is 11 times as large over 256 of them)."""
    c = case(rows=512, vocabulary=40, width=16).to(dtype, device)
    exact_c = c.to(torch.float64, device)
    exact_leaves = exact_c.leaves()
    exact = grads(materialised(exact_leaves, exact_c, alpha=1.0), exact_leaves, 1.0)
    errors = []
    for chunk_rows in (512, 16, 2):
        leaves = c.leaves()
        made = grads(fused(leaves, c, alpha=1.0, chunk_rows=chunk_rows), leaves, 1.0)
        errors.append([float((m.double() - e).norm() / e.norm()) for m, e in zip(made, exact)])
    for one, few, many in zip(*errors):
        assert few <= 1.1 * one
        assert many <= 1.1 * one


@devices
@pytest.mark.parametrize("recompute", [False, True])
def test_upstream_gradient_rounded_to_half_precision(recompute: bool, device: str) -> None:
    """0.7001 in bfloat16 is 0.6992: 1.3e-3 off in every element, all one way."""
    c = case(rows=64, width=32).to(torch.bfloat16, device)
    leaves = c.leaves()
    ones = grads(fused(leaves, c, alpha=0.5, chunk_rows=16), leaves, 1.0)
    scaled = grads(fused(leaves, c, alpha=0.5, chunk_rows=16, recompute=recompute), leaves, 0.7001)
    for one, by_upstream in zip(ones[:2], scaled[:2]):  # the bias is too short: roundings do not average out
        assert by_upstream.dtype == torch.bfloat16
        ratio = float((by_upstream.double() * one.double()).sum() / one.double().square().sum())
        assert ratio == pytest.approx(0.7001, rel=6e-4)


@devices
def test_upstream_gradient_of_every_row_is_its_own(device: str) -> None:
    """Not that of the first row, and not their mean: reduction="none" against autograd, by random upstream gradients."""
    c = case().to(torch.float64, device)
    upstream_N = torch.randn(23, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = c.leaves()
    wanted = materialised(leaves, c, alpha=0.3, reduction="none")
    got = fused(leaves, c, alpha=0.3, reduction="none", recompute=True, chunk_rows=4)
    assert torch.allclose(got.loss, wanted.loss, rtol=1e-12)
    for ours, exact in zip(grads(got, leaves, upstream_N), grads(wanted, leaves, upstream_N)):
        assert torch.allclose(ours, exact, rtol=1e-10, atol=1e-13)


def test_reduction_none_needs_recompute() -> None:
    c = case()
    with pytest.raises(ValueError, match="`reduction`"):
        fused(c.leaves(), c, reduction="none")
    with torch.no_grad():
        assert fused(c.leaves(), c, reduction="none").loss.shape == (23,)


@devices
def test_loss_is_zero_without_a_gradient(device: str) -> None:
    """No gradient wanted: the same loss, rows and all, nothing to call backward on, and nothing written to."""
    c = case().to(torch.float32, device)
    with_gradient = fused(c.leaves(), c, alpha=0.3, chunk_rows=6)
    frozen = [c.hidden_ND, c.weight_VD, c.bias_V]
    before = [x.clone() for x in frozen]
    with torch.no_grad():
        evaluated = fused(c.leaves(), c, alpha=0.3, chunk_rows=6)
    for out in (evaluated, fused(frozen, c, alpha=0.3, chunk_rows=6)):
        assert not out.loss.requires_grad
        assert torch.equal(out.loss, with_gradient.loss.detach())
        assert torch.equal(out.kd_N, with_gradient.kd_N)
    assert all(torch.equal(x, y) for x, y in zip(frozen, before))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("learns", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_parts_get_no_gradient_and_change_no_other(learns: tuple[int, ...], recompute: bool) -> None:
    c = case()
    leaves = c.leaves()
    wanted = grads(materialised(leaves, c, alpha=0.3), leaves)
    leaves = [x.requires_grad_(i in learns) for i, x in enumerate(c.leaves())]
    (fused(leaves, c, alpha=0.3, chunk_rows=5, recompute=recompute).loss * 3.7).backward()  # type: ignore[no-untyped-call]
    for i, leaf in enumerate(leaves):
        if i in learns:
            assert leaf.grad is not None
            assert torch.allclose(leaf.grad, wanted[i], rtol=1e-10, atol=1e-13)
        else:
            assert leaf.grad is None


@devices
def test_padded_columns_take_probability(device: str) -> None:
    """Rows of the weight beyond `vocab_size` with a logit of 0 or of 1e4, or NaN: as if they were not there."""
    c = case(vocabulary=61).to(torch.float32, device)
    leaves = c.leaves()
    wanted = fused(leaves, c, alpha=0.3, missing="tail_bucket")
    wanted_grads = grads(wanted, leaves)
    for junk in (0.0, 1e4, math.nan):
        wide = replace(
            c,
            weight_VD=torch.cat((c.weight_VD, torch.full_like(c.weight_VD[:3], junk))),
            bias_V=torch.cat((c.bias_V, torch.full_like(c.bias_V[:3], junk))),
        )
        leaves = wide.leaves()
        got = fused(leaves, wide, alpha=0.3, missing="tail_bucket", vocab_size=61, chunk_rows=8)
        assert float(got.loss.detach()) == pytest.approx(float(wanted.loss.detach()), rel=1e-6)
        hidden_ND, weight_VD, bias_V = grads(got, leaves)
        assert torch.allclose(hidden_ND, wanted_grads[0], rtol=1e-4, atol=1e-6)
        assert torch.allclose(weight_VD[:61], wanted_grads[1], rtol=1e-4, atol=1e-6)
        assert bool((weight_VD[61:] == 0).all())
        assert bool((bias_V[61:] == 0).all())


@devices
def test_label_in_the_padding_is_refused(device: str) -> None:
    c = case().to(torch.float32, device)
    with pytest.raises(ValueError, match="`labels_N`"):
        fused(c.leaves(), replace(c, labels_N=torch.full_like(c.labels_N, 60)), vocab_size=60, alpha=1.0, check=True)


def test_saturated_soft_cap_loses_its_slope() -> None:
    """Logits of 4 times the cap: 1 - tanh**2 is 1.3e-3, of which a rounded bfloat16 tanh leaves 0. Off by a bfloat16 or two."""
    c = case(rows=40, width=4)
    c = replace(c, hidden_ND=c.hidden_ND.sign() * 2, weight_VD=c.weight_VD.sign() * 2, bias_V=c.bias_V * 0)
    c = c.to(torch.bfloat16)
    exact_c = c.to(torch.float64)
    exact_leaves, leaves = exact_c.leaves(), c.leaves()
    exact = grads(materialised(exact_leaves, exact_c, alpha=1.0, softcap=4.0), exact_leaves)
    made = grads(fused(leaves, c, alpha=1.0, softcap=4.0), leaves)
    for ours, true in zip(made, exact):
        assert float((ours.double() - true).norm() / true.norm()) < 2**-6


def test_each_weight_changes_the_gradient() -> None:
    """The hard-label part is in the loss that is differentiated, not an aside."""
    c = case()
    made = []
    for alpha in (0.0, 0.5, 1.0):
        leaves = c.leaves()
        made.append(grads(fused(leaves, c, alpha=alpha), leaves)[1])
    assert torch.allclose(made[1], (made[0] + made[2]) / 2, rtol=1e-10, atol=1e-14)
    assert worst(made[0], made[2]) > 0.01


def test_no_default_mixes_in_another_loss() -> None:
    """Nothing but the distillation term unless asked for: no half of cross-entropy, no temperature from elsewhere."""
    c = case()
    out = fused(c.leaves(), c, row_weights_N=c.row_weights_N)
    assert float(out.loss.detach()) == pytest.approx(float((c.row_weights_N * out.kd_N).sum()), rel=1e-12)


def test_small_gradients_of_the_tail_are_dropped() -> None:
    """Each of 8000 tail ids is pushed down by less than 2.4e-4, the least that a filter of bfloat16 gradients lets pass."""
    c = case(rows=8, vocabulary=8_000, width=4)
    c = replace(c, hidden_ND=c.hidden_ND * 0.01, bias_V=c.bias_V * 0).to(torch.bfloat16)
    exact_c = c.to(torch.float64)
    leaves, exact_leaves = c.leaves(), exact_c.leaves()
    made = grads(fused(leaves, c, alpha=1.0), leaves, 1.0)[2]
    exact = grads(materialised(exact_leaves, exact_c, alpha=1.0), exact_leaves, 1.0)[2]
    tail = exact > 0
    assert float(exact[tail].max()) < 2.4e-4
    assert float(made[tail].sum()) == pytest.approx(float(exact[tail].sum()), rel=2**-8)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_a_hundred_apart_make_nan(dtype: torch.dtype, divergence: str) -> None:
    """Both probabilities of an id underflow: the logarithm of their mixture must not."""
    c = case().to(dtype)
    c = replace(c, weight_VD=c.weight_VD * 40)
    leaves = c.leaves()
    out = fused(leaves, c, divergence=divergence, missing="tail_bucket")
    assert float(out.loss.detach()) > 0
    assert all(bool(x.isfinite().all()) for x in (out.loss, *grads(out, leaves)))


def test_normaliser_counts_rows_not_entries_nor_chunks() -> None:
    c = case()
    out = fused(c.leaves(), c, alpha=0.3, chunk_rows=2)
    labelled_N = c.labels_N != -100
    wanted = (0.7 * out.kd_N + 0.3 * out.ce_N)[labelled_N].mean()
    assert float(out.loss.detach()) == pytest.approx(float(wanted), rel=1e-12)


@devices
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_without_weight_leave_the_matrix_products(recompute: bool, device: str) -> None:
    """NaN and infinity in their hidden states reach nothing: 0 times them would not be 0."""
    c = case().to(torch.float64, device)
    leaves = c.leaves()
    wanted = grads(fused(leaves, c, alpha=0.3), leaves)
    dead_N = c.labels_N == -100
    dirty = replace(c, hidden_ND=torch.where(dead_N[:, None], math.nan, c.hidden_ND))
    leaves = dirty.leaves()
    made = grads(fused(leaves, dirty, alpha=0.3, recompute=recompute), leaves)
    for ours, exact in zip(made, wanted):
        assert torch.allclose(ours, exact, rtol=1e-12, atol=1e-15)
    assert bool((made[0][dead_N] == 0).all())


@devices
@pytest.mark.parametrize("how", [dict(), dict(recompute=True), dict(compact=False)], ids=str)
def test_nothing_to_learn(how: dict[str, Any], device: str) -> None:
    """All rows ignored, or none at all: loss 0 and gradients of zeros, not of what memory held."""
    c = case().to(torch.float32, device)
    ignored = replace(c, labels_N=torch.full_like(c.labels_N, -100))
    none = case(rows=0).to(torch.float32, device)
    for empty in (ignored, none):
        leaves = empty.leaves()
        out = fused(leaves, empty, alpha=0.3, **how)
        assert float(out.loss.detach()) == 0.0
        for leaf, made in zip(leaves, grads(out, leaves)):
            assert made.shape == leaf.shape
            assert bool((made == 0).all())


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_twice_and_second_derivative(recompute: bool) -> None:
    c = case()
    leaves = c.leaves()
    loss = fused(leaves, c, alpha=0.3, recompute=recompute).loss
    first = [x.clone() for x in torch.autograd.grad(loss, leaves, retain_graph=True)]
    second = torch.autograd.grad(2 * loss, leaves)
    for one, two in zip(first, second):
        assert torch.allclose(two, 2 * one, rtol=1e-12)
    loss = fused([*c.leaves()[:2], c.bias_V], c, recompute=recompute).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss.backward(create_graph=True)  # type: ignore[no-untyped-call]


def test_one_weight_as_embedding_and_head() -> None:
    """Tied weights: both gradients arrive in one tensor."""
    c = case()
    tokens_N = c.labels_N.clamp_min(0)
    made = []
    for function in (materialised, fused):
        weight_VD = c.weight_VD.clone().requires_grad_()
        function([torch.tanh(weight_VD[tokens_N]), weight_VD, c.bias_V], c, alpha=0.3).loss.backward()  # type: ignore[no-untyped-call]
        made.append(weight_VD.grad)
    assert torch.allclose(made[0], made[1], rtol=1e-10, atol=1e-14)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_strides_and_sliced_labels(dtype: torch.dtype, device: str) -> None:
    c = case().to(dtype, device)
    leaves = c.leaves()
    wanted = grads(fused(leaves, c, alpha=0.3, chunk_rows=6), leaves)
    odd_labels_N = torch.cat((c.labels_N[:1], c.labels_N))[1:]
    hidden_ND = torch.stack((c.hidden_ND, c.hidden_ND), 2)[:, :, 1].detach().requires_grad_()
    weight_VD = c.weight_VD.t().contiguous().t().detach().requires_grad_()
    out = fused([hidden_ND, weight_VD, leaves[2]], replace(c, labels_N=odd_labels_N), alpha=0.3, chunk_rows=6)
    for ours, exact in zip(grads(out, [hidden_ND, weight_VD, leaves[2]]), wanted):
        assert worst(ours, exact) <= float(torch.finfo(dtype).eps) * float(exact.abs().max()) * 16


@devices
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_keeps_the_master_weights_gradient_wide(recompute: bool, device: str) -> None:
    """float32 parameters, bfloat16 products: the weight's gradient is never rounded to bfloat16 on its way."""
    c = case(rows=64, width=16).to(torch.float32, device)
    leaves = c.leaves()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = fused(leaves, c, alpha=0.3, recompute=recompute)
    made = grads(out, leaves)
    rounded_c = c.to(torch.bfloat16, device)
    exact_leaves = rounded_c.to(torch.float64, device).leaves()
    exact = grads(materialised(exact_leaves, rounded_c, alpha=0.3), exact_leaves)
    for ours, true in zip(made, exact):
        assert ours.dtype == torch.float32
        assert float((ours.double() - true).norm() / true.norm()) < 2**-7
    assert not torch.equal(made[1], made[1].bfloat16().float())


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [dict(alpha=0.3), dict(recompute=True, softcap=5.0), dict(alpha=1.0, targets=None, vocab_size=60)],
    ids=str,
)
def test_compiles_without_a_graph_break(options: dict[str, Any]) -> None:
    c = case(vocabulary=60)

    def loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        return fused([torch.tanh(hidden_ND), weight_VD, bias_V], c, chunk_rows=8, **options).loss

    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = c.leaves()
        (function(*leaves) * 3.7).backward()  # type: ignore[no-untyped-call]
        found.append([x.grad for x in leaves])
    for eager, compiled in zip(*found):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("recompute", [False, True])
def test_operators_keep_the_rules_of_torch_library(recompute: bool) -> None:
    from stillroom.kernels.fused_linear.spec import Spec
    from stillroom.kernels.sparse_kd.problem import make_problem

    c = case()
    problem = make_problem(
        c.targets, c.labels_N, vocabulary=61, dtype=torch.float64, device=torch.device("cpu"), alpha=0.3
    )
    packed = Spec(problem, 1.0, None, 61, 8, True, "reference", torch.float64).pack()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for learns in ([True, True, True], [True, False, False]):
        leaves = [x.requires_grad_(w) for x, w in zip(c.leaves(), learns)]
        arguments = (*leaves, *packed, learns, False, recompute)
        torch.library.opcheck(torch.ops.stillroom.fused_linear_sparse_kd, arguments, test_utils=checks)
        backward = (torch.tensor(2.0), *(x.detach() for x in leaves), *packed, learns)
        torch.library.opcheck(torch.ops.stillroom.fused_linear_sparse_kd_gradients, backward, test_utils=checks)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hidden_ND", dict(hidden_ND=torch.zeros(23))),
        ("hidden_ND", dict(hidden_ND=torch.zeros(23, 8, dtype=torch.int64))),
        ("weight_VD", dict(weight_VD=torch.zeros(61, 7))),
        ("weight_VD", dict(weight_VD=torch.zeros(61, 8, dtype=torch.bfloat16))),
        ("weight_VD", dict(weight_VD=torch.zeros(0, 8))),
        ("bias_V", dict(bias_V=torch.zeros(60))),
        ("bias_V", dict(bias_V=torch.zeros(61, dtype=torch.float64))),
        ("labels_N", dict(labels_N=torch.zeros(22, dtype=torch.int64))),
        ("labels_N", dict(labels_N=torch.full((23,), 61))),
        ("logit_scale", dict(logit_scale=0.0)),
        ("logit_scale", dict(logit_scale=math.nan)),
        ("softcap", dict(softcap=0.0)),
        ("softcap", dict(softcap=math.inf)),
        ("vocab_size", dict(vocab_size=62)),
        ("vocab_size", dict(vocab_size=0)),
        ("targets.ids", dict(vocab_size=20)),
        ("chunk_rows", dict(chunk_rows=0)),
        ("impl", dict(impl="liger")),
        ("alpha", dict(alpha=1.5)),
        ("divergence", dict(divergence="kl")),
        ("temperature", dict(temperature=0.0)),
        ("reduction", dict(reduction="mean")),
        ("missing", dict(missing="ghost")),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name: str, changes: dict[str, Any]) -> None:
    c = case().to(torch.float32)
    labels_N = c.labels_N.clamp_max(15)
    arguments: dict[str, Any] = dict(
        hidden_ND=c.hidden_ND.requires_grad_(), weight_VD=c.weight_VD, targets=c.targets, labels_N=labels_N, alpha=0.5
    )
    fused_linear_sparse_kd(**arguments)
    with pytest.raises(ValueError, match=f"`{name}`"):
        fused_linear_sparse_kd(**{**arguments, **changes})
