"""The distillation loss as Triton kernels: equal to the reference in every option, and what is special to a kernel.

On a CPU they run in the interpreter; the same tests run on a GPU under the marker `gpu`.

Shapes: `N` rows, `V` vocabulary, `E` entries.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.kernels.backend import resolve
from stillroom.kernels.sparse_kd import DIVERGENCES, MISSING_MASS, SparseKDOutput, TargetSplit, sparse_kd_loss
from stillroom.kernels.targets import SparseTargets
from stillroom.kernels.tuning import LAUNCHES, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BACKENDS = pytest.mark.parametrize("impl", ["reference", "triton"])


def problem(
    entries: list[int], vocabulary: int = 93, seed: int = 0, mass: float = 0.9, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, SparseTargets, Tensor, Tensor, TargetSplit]:
    """Logits, targets with log p, labels, row weights and split; row 0's label is kept, row 2 ignored, row 3 weightless."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(entries)
    logits_NV = torch.randn(rows, vocabulary, generator=generator) * 3
    ids = torch.cat(
        [torch.zeros(0, dtype=torch.int64)] + [torch.randperm(vocabulary, generator=generator)[:k] for k in entries]
    )
    offsets = torch.tensor([0, *itertools.accumulate(entries)])
    row_E = torch.arange(rows).repeat_interleave(offsets.diff())
    near_E = (logits_NV[row_E, ids] + torch.randn(len(ids), generator=generator)).double().exp()
    total_N = torch.zeros(rows, dtype=torch.float64).index_add_(0, row_E, near_E)
    weight_E = mass * near_E / total_N[row_E]
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    weight_N = torch.rand(rows, generator=generator) + 0.1
    if entries and entries[0]:
        labels_N[0] = ids[entries[0] - 1]
    labels_N[2:3], weight_N[3:4] = -100, 0.0
    targets = SparseTargets(
        offsets, ids.int(), weight_E.float(), -torch.rand(rows, generator=generator) * 3, torch.zeros(rows),
        (weight_E.log() + 0.3 * torch.randn(len(ids), generator=generator)).float(),  # a weight need not be p
    )  # fmt: skip
    split = TargetSplit(
        torch.rand(rows, generator=generator).to(DEVICE), torch.rand(rows, generator=generator).to(DEVICE)
    )
    on = logits_NV.to(DEVICE, dtype), targets.to(DEVICE), labels_N.to(DEVICE), weight_N.to(DEVICE)
    return *on, split


def run(
    logits_NV: Tensor, *arguments: Any, upstream: Tensor | float = 1.0, **options: Any
) -> tuple[SparseKDOutput, Tensor]:
    z = logits_NV.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = sparse_kd_loss(z * 1.0, *arguments, **options)
    (out.loss * upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    return out, z.grad


def assert_same(logits_NV: Tensor, *arguments: Any, **options: Any) -> None:
    """Triton and reference agree to what float32 carries, half-precision gradients to a unit in the last place."""
    wanted, gradient = run(logits_NV, *arguments, impl="reference", **options)
    out, got = run(logits_NV, *arguments, impl="triton", **options)
    square = options.get("temperature", 1.0) ** 2
    size = float(logits_NV.float()[logits_NV.isfinite()].abs().max())
    assert torch.allclose(out.kd_N, wanted.kd_N, rtol=2e-5, atol=1e-6 * square * (1 + size))
    assert torch.allclose(out.ce_N, wanted.ce_N, rtol=2e-6, atol=1e-6 * (1 + size))
    assert torch.allclose(out.loss, wanted.loss, rtol=2e-5, atol=1e-6 * square * (1 + size))
    unit = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype]
    small = 1e-6 if got.dtype != torch.float16 else 1e-6 + 2**-24
    assert torch.allclose(got.float(), gradient.float(), rtol=unit, atol=small * (1 + 0.1 * size))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000), entries=st.lists(st.integers(0, 70), min_size=1, max_size=4), vocabulary=st.integers(70, 200),
    name=st.sampled_from(sorted(DIVERGENCES)), missing=st.sampled_from(MISSING_MASS), alpha=st.sampled_from([0.0, 0.4, 1.0]),
    temperature=st.sampled_from([1.0, 2.0, 3.0, 4.0, 0.7]), split=st.booleans(), mass=st.sampled_from([0.5, 0.95, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), inplace=st.booleans(),
    reduction=st.sampled_from(["sum", "none"]), default_weights=st.booleans(),
)  # fmt: skip
def test_equals_the_reference_anywhere(
    seed: int, entries: list[int], vocabulary: int, name: str, missing: str, alpha: float, temperature: float, split: bool,
    mass: float, dtype: torch.dtype, inplace: bool, reduction: str, default_weights: bool,
) -> None:  # fmt: skip
    logits_NV, targets, labels_N, weight_N, coefficients = problem(entries, vocabulary, seed, mass, dtype)
    wanted = split and name == "forward_kl" and missing != "renormalise_both"
    assert_same(
        logits_NV, targets, labels_N, divergence=name, missing=missing, alpha=alpha, temperature=temperature,
        split=coefficients if wanted else None, inplace=inplace, reduction=reduction,
        row_weights_N=None if default_weights else weight_N,
    )  # fmt: skip


@pytest.mark.parametrize("entries", [[0] * 5, [1] * 5, [12] * 5, [50] * 5, [257] * 5, [0, 300, 1, 2, 129]])
def test_supports_of_every_size(entries: list[int]) -> None:
    """Beyond one block of entries too; their logits then wait in memory until the row is written."""
    logits_NV, targets, labels_N, weight_N, split = problem(entries, 300)
    for missing in ("truncate", "tail_bucket"):
        for inplace in (False, True):
            options: dict[str, Any] = dict(alpha=0.3, missing=missing, row_weights_N=weight_N, inplace=inplace)
            assert_same(logits_NV, targets, labels_N, **options)
    assert_same(logits_NV, targets, labels_N, missing="tail_bucket", split=split)
    assert_same(logits_NV, targets, labels_N, divergence="jsd", missing="renormalise_both", temperature=2.0)


def test_cross_entropy_alone() -> None:
    logits_NV, _, labels_N, weight_N, _ = problem([0] * 5)
    assert_same(logits_NV, None, labels_N, alpha=1.0, row_weights_N=weight_N)
    for missing in MISSING_MASS:
        assert_same(logits_NV, None, labels_N, alpha=1.0, missing=missing)


def test_rows_wider_than_a_block() -> None:
    """The last block sticks out of the row; what lies behind it in memory must not be read as logits."""
    logits_NV, targets, labels_N, weight_N, _ = problem([40] * 5, 20_011)
    wide = torch.full((5, 20_500), 1e4, device=DEVICE)
    for missing in ("truncate", "tail_bucket"):
        view = wide[:, :20_011].copy_(logits_NV)
        assert_same(view, targets, labels_N, alpha=0.3, missing=missing, row_weights_N=weight_N)


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_to_learn(inplace: bool) -> None:
    """All rows ignored, or none at all; what stands in an ignored row does not matter."""
    logits_NV, targets, labels_N, weight_N, _ = problem([12] * 5)
    options: dict[str, Any] = dict(alpha=0.3, inplace=inplace, impl="triton")
    out, got = run(logits_NV, targets, torch.full_like(labels_N, -100), **options)
    assert (float(out.loss.detach()), float(got.abs().max())) == (0.0, 0.0)
    logits_NV[2:4] = math.nan
    out, got = run(logits_NV, targets, labels_N, row_weights_N=weight_N, **options)
    assert math.isfinite(float(out.loss.detach()))
    assert bool(got.isfinite().all())
    assert bool((got[2:4] == 0).all())
    assert bool((out.kd_N[2:4] == 0).all())
    empty = problem([])
    out, got = run(empty[0], empty[1], empty[2], **options)
    assert (float(out.loss.detach()), got.shape) == (0.0, (0, 93))


def test_masked_vocabulary() -> None:
    """-inf logits, as of padded columns: no gradient there, no NaN, also where the row begins with them."""
    logits_NV, targets, labels_N, weight_N, _ = problem([12] * 5, 3_000)
    logits_NV[:, :1_100] = -math.inf
    ids_E = 1_100 + torch.stack([torch.randperm(1_900)[:12] for _ in range(5)]).flatten()
    targets = SparseTargets(
        targets.offsets, ids_E.int().to(DEVICE), targets.weights, targets.label_logp, targets.entropy, targets.logp
    )
    labels_N = torch.where(labels_N < 0, labels_N, 1_100 + labels_N % 1_900)
    for missing in MISSING_MASS:
        options: dict[str, Any] = dict(alpha=0.3, missing=missing, row_weights_N=weight_N)
        assert_same(logits_NV, targets, labels_N, **options)
        _, got = run(logits_NV, targets, labels_N, impl="triton", **options)
        assert bool((got[:, :1_100] == 0).all())
        assert bool(got.isfinite().all())


def test_an_id_out_of_range_shows_and_is_not_read() -> None:
    """Without a look at the values beforehand: the row is NaN, the others are right."""
    logits_NV, targets, labels_N, _, _ = problem([5] * 5)
    wanted, _ = run(logits_NV, targets, labels_N, impl="triton", reduction="none")
    for wrong in (93, -1, 2**31 - 1):
        ids = targets.ids.clone()
        ids[7] = wrong
        bad = SparseTargets(targets.offsets, ids, targets.weights, targets.label_logp, targets.entropy)
        for missing in MISSING_MASS:
            out, _ = run(logits_NV, bad, labels_N, impl="triton", reduction="none", check=False, missing=missing)
            assert bool(out.loss[1].isnan())
            assert bool(out.loss[[0, 2, 3, 4]].isfinite().all())
        assert torch.allclose(out.ce_N[[0, 2, 3, 4]], wanted.ce_N[[0, 2, 3, 4]], rtol=1e-6)
        with pytest.raises(ValueError, match=r"`targets\.ids`"):
            sparse_kd_loss(logits_NV, bad, labels_N, impl="triton", check=True)


def test_half_precision_gradient_is_rounded_once() -> None:
    """Within half a unit in the last place of the float64 gradient, where the student is close to the target too."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (torch.randn(6, 500, generator=generator) * 2).bfloat16()
    q_NV = logits_NV.double().softmax(1)
    ids_NK = q_NV.topk(30, 1).indices
    factor_NK = 1 + 1e-3 * torch.where(torch.rand(6, 30, generator=generator) < 0.5, -1.0, 1.0)
    weight_NK = (q_NV.gather(1, ids_NK) * factor_NK).float()
    targets = SparseTargets(
        torch.arange(7) * 30, ids_NK.flatten().int(), weight_NK.flatten(), torch.zeros(6), torch.zeros(6)
    )
    labels_N, weight_N = torch.zeros(6, dtype=torch.int64, device=DEVICE), torch.ones(6, device=DEVICE)
    _, got = run(logits_NV.to(DEVICE), targets.to(DEVICE), labels_N, impl="triton", row_weights_N=weight_N)
    exact = q_NV * weight_NK.double().sum(1, keepdim=True)
    exact.scatter_add_(1, ids_NK, -weight_NK.double())
    error = (got.cpu().double() - exact).abs()
    # |q - w| is 1e-3 of q, and q itself is known to a few 2**-24
    assert bool((error <= exact.abs() * 2**-8 + q_NV * 2**-21).all())


# ---- upstream gradients ----------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_gradient_of_each_row_is_its_own(dtype: torch.dtype, impl: str) -> None:
    """Not the first row's for all, and not applied after the rows were added up."""
    logits_NV, targets, labels_N, weight_N, _ = problem([12] * 6, dtype=dtype)
    upstream_N = torch.randn(6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options: dict[str, Any] = dict(alpha=0.3, reduction="none", row_weights_N=weight_N, impl=impl)
    _, one = run(logits_NV, targets, labels_N, **options)
    _, got = run(logits_NV, targets, labels_N, upstream=upstream_N, **options)
    assert torch.equal(got, (one.float() * upstream_N[:, None]).to(dtype))
    _, weighted = run(logits_NV, targets, labels_N, **{**options, "row_weights_N": weight_N * upstream_N})
    assert torch.allclose(got.float(), weighted.float(), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-8)


@BACKENDS
def test_loss_of_each_row_is_the_sums_share(impl: str) -> None:
    logits_NV, targets, labels_N, weight_N, _ = problem([12] * 6)
    options: dict[str, Any] = dict(alpha=0.3, row_weights_N=weight_N, impl=impl)
    rows, gradient = run(logits_NV, targets, labels_N, reduction="none", **options)
    out, got = run(logits_NV, targets, labels_N, **options)
    assert float(rows.loss.detach().sum()) == pytest.approx(float(out.loss.detach()), rel=1e-6)
    assert torch.equal(gradient, got)
    plain, _ = run(logits_NV, targets, labels_N, reduction="none", impl=impl)  # weight 1 by default, 0 where ignored
    assert torch.allclose(plain.loss.detach(), plain.kd_N)


def test_second_backward_is_refused_where_the_gradient_was_scaled_in_place() -> None:
    logits_NV, targets, labels_N, _, _ = problem([12] * 4)
    z = logits_NV.requires_grad_()
    loss = sparse_kd_loss(z, targets, labels_N, impl="triton").loss
    torch.autograd.grad(loss * 2, z, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss, z)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sparse_kd_loss(z, targets, labels_N, impl="triton").loss, z, create_graph=True)


# ---- ownership of the logits -----------------------------------------------------------------------------------------


def test_the_callers_logits_are_never_touched_unless_given_up() -> None:
    logits_NV, targets, labels_N, _, split = problem([12] * 5)
    before = logits_NV.clone()
    for missing in MISSING_MASS:
        z = logits_NV.requires_grad_()
        sparse_kd_loss(z, targets, labels_N, alpha=0.3, missing=missing, impl="triton").loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():  # inplace is ignored where no gradient is wanted
            out = sparse_kd_loss(z, targets, labels_N, alpha=0.3, missing=missing, inplace=True, impl="triton")
        assert not out.loss.requires_grad
        assert torch.equal(z.detach(), before)
    sparse_kd_loss(z, targets, labels_N, split=split, missing="tail_bucket", impl="triton")
    assert torch.equal(z.detach(), before)


def test_given_up_logits_hold_the_gradient_and_autograd_knows() -> None:
    """A kernel's stores do not raise the tensor's version by themselves: an operation that saved it would go wrong in silence."""
    logits_NV, targets, labels_N, _, _ = problem([12] * 5)
    _, wanted = run(logits_NV, targets, labels_N, impl="triton")
    z = logits_NV.clone().requires_grad_()
    shared = z * 1.0
    other = shared.square().sum()
    loss = sparse_kd_loss(shared, targets, labels_N, inplace=True, impl="triton").loss
    assert torch.equal(shared.detach(), wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("inplace", [False, True])
def test_strides_and_labels_at_an_odd_address(inplace: bool) -> None:
    logits_NV, targets, labels_N, _, _ = problem([12] * 5)
    wanted, gradient = run(logits_NV, targets, labels_N, alpha=0.3, impl="triton")
    odd_labels_N = torch.cat((torch.zeros(1, dtype=torch.int64, device=DEVICE), labels_N))[1:]
    wide = torch.zeros(5, 100, device=DEVICE)
    for view in (wide[:, 3:96].copy_(logits_NV), logits_NV.t().contiguous().t()):
        z = view.detach().requires_grad_()
        given = z.view_as(z) if inplace else z
        out = sparse_kd_loss(given, targets, odd_labels_N, alpha=0.3, inplace=inplace, impl="triton")
        (got,) = torch.autograd.grad(out.loss, z)
        assert torch.equal(out.loss.detach(), wanted.loss.detach())
        assert torch.equal(got, gradient)


@pytest.mark.parametrize(("missing", "most"), [("truncate", 0), ("tail_bucket", 1)])
def test_one_buffer_of_the_logits_size(missing: str, most: int) -> None:
    """Beside the gradient only the marks of the entries, a bit for an id."""
    logits_NV, targets, labels_N, _, _ = problem([12] * 8, 32_000)
    made: dict[int, int] = {}

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > 16_000:
                    made[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return result

    z = logits_NV.clone().requires_grad_()
    with Watch():  # type: ignore[no-untyped-call]
        sparse_kd_loss(z, targets, labels_N, missing=missing, impl="triton").loss.backward()  # type: ignore[no-untyped-call]
    made.pop(z.untyped_storage().data_ptr(), None)
    sizes = sorted(made.values(), reverse=True)
    assert sizes[0] == logits_NV.nbytes
    assert len(sizes) == 1 + most
    assert sum(sizes[1:]) <= logits_NV.numel() // 8


# ---- torch.compile, choice of the implementation, other machines -----------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiles_into_one_graph(impl: str, reduction: str) -> None:
    _, targets, labels_N, weight_N, split = problem([12] * 5)
    head = torch.nn.Linear(16, 93).to(DEVICE)
    hidden_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def step(hidden_ND: Tensor) -> tuple[Tensor, Tensor]:
        out = sparse_kd_loss(
            head(hidden_ND), targets, labels_N, alpha=0.3, temperature=2.0, split=split, row_weights_N=weight_N, impl=impl,
            reduction=reduction, inplace=True,
        )  # fmt: skip
        return (out.loss * 3).sum(), out.kd_N

    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        head.zero_grad()
        loss, kd_N = function(hidden_ND)
        loss.backward()  # type: ignore[no-untyped-call]
        assert head.weight.grad is not None
        found.append((loss.detach(), kd_N, head.weight.grad.clone()))
    for eager, compiled in zip(*found):
        assert torch.allclose(eager, compiled, rtol=1e-6, atol=1e-7)
    assert not found[1][1].requires_grad


def test_operator_keeps_its_promises() -> None:
    """Schema, fake implementation and autograd registration, by PyTorch's own checks."""
    logits_NV, targets, labels_N, weight_N, _ = problem([3] * 4, 20)
    given = (targets.offsets, targets.ids, targets.weights, targets.label_logp, targets.entropy, targets.logp)
    rest = (0.3, "jsd", 0.5, 2.0, "tail_bucket", True, "reference")
    torch.library.opcheck(
        torch.ops.stillroom.sparse_kd.default,
        (logits_NV.requires_grad_(), *given, labels_N, weight_N, None, None, *rest),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_choice_of_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.zeros(1)
    assert resolve("auto", here) == resolve("reference", here) == "reference"
    with pytest.raises(ValueError, match="choose one of auto, triton, reference"):
        resolve("cuda", here)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", here) == "triton"
    with pytest.raises(ValueError, match="float64"):
        resolve("triton", here.double())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve("triton", here)


def test_launch_table_covers_every_width() -> None:
    for kernel in {row.kernel for row in LAUNCHES}:
        for width in (1, 37, 1024, 1025, 50_257, 262_144, 1 << 24):
            row = launch(kernel, width)
            assert width <= row.up_to
            assert row.block & (row.block - 1) == 0
            assert row.source


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stillroom.kernels.sparse_kd import kernels_triton as kernels

kinds = dict(X="*bf16", G="*bf16", OFF="*i64", IDS="*i32", LAB="*i64", HOLES_AT="*i32", x_stride="i64", g_stride="i64",
             words="i32", V="i32")
kinds |= {name: "*fp32" for name in "W LOGP WEIGHT LABEL_LOGP TKD DKD Z KD CE".split()}
kernel = kernels.rows_kernel
for divergence, missing, split, power, targets, gradient in (
    (0, 0, False, 0, True, True), (1, 1, False, 2, True, True), (2, 2, False, 1, True, True), (3, 3, False, 3, True, True),
    (4, 0, False, 4, True, True), (5, 3, False, 0, True, False), (0, 3, True, 1, True, True), (0, 0, False, 0, False, True),
):
    holes = targets and (split or missing == 3)
    fixed = dict(TARGETS=targets, DIVERGENCE=divergence, MISSING=missing, SPLIT=split, HOLES=holes, POWER=power,
                 GRADIENT=gradient, EMULATE=False, KBLOCK=32, BLOCK=8192)
    absent = [] if gradient else ["G"]
    absent += [] if targets else ["OFF", "IDS", "W", "LOGP"]
    absent += ([] if split else ["LABEL_LOGP", "TKD", "DKD"]) + ([] if holes else ["HOLES_AT"])
    fixed |= dict.fromkeys(absent)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else kinds.get(name, "fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=16))
    assert len(done.asm["cubin"]) > 1000
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    """To machine code, without a GPU: what the interpreter accepts and the compiler does not would show here."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits() -> None:
    """The last rows lie beyond what 32 bits can count."""
    rows, vocabulary = 16_750, 128_256
    logits_NV = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    small, targets, labels_N, _, _ = problem([12] * rows, 93)
    logits_NV[:, :93] = small.bfloat16()
    whole = sparse_kd_loss(logits_NV.requires_grad_(), targets, labels_N, inplace=False, reduction="none")
    whole.loss.sum().backward()  # type: ignore[no-untyped-call]
    last = slice(rows - 3, rows)
    entries = slice(12 * (rows - 3), 12 * rows)
    assert targets.logp is not None
    tail = SparseTargets(
        torch.arange(4, device="cuda") * 12, targets.ids[entries], targets.weights[entries], targets.label_logp[last],
        targets.entropy[last], targets.logp[entries],
    )  # fmt: skip
    wanted, gradient = run(logits_NV[last], tail, labels_N[last], reduction="none", impl="reference")
    assert torch.allclose(whole.loss[last], wanted.loss, rtol=1e-5)
    assert logits_NV.grad is not None
    assert torch.allclose(logits_NV.grad[last].float(), gradient.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    logits_NV, targets, labels_N, _, _ = problem([12] * 5)
    _, wanted = run(logits_NV, targets, labels_N)
    _, got = run(logits_NV.to("cuda:1"), targets.to("cuda:1"), labels_N.to("cuda:1"))
    assert torch.equal(got.to(DEVICE), wanted)
