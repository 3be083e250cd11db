"""The kernels on a CUDA GPU against eager PyTorch, torch.compile, Liger-Kernel and the floors of memory and arithmetic.

`python -m benchmarks.kernels` comes here where there is a CUDA device and writes docs/benchmarks/kernels-NAME.{json,md}, NAME
the GPU's (kernels-h200). `--tiny` goes through all of it at toy sizes, in Triton's interpreter where there is no GPU, and
writes nothing: that the command stands ready.

Shapes: `N` rows, `V` vocabulary, `D` width, `E` entries.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import report
from stillroom.kernels.fused_linear import fused_linear_sparse_kd, peak_bytes
from stillroom.kernels.sample import sample
from stillroom.kernels.sparse_kd import sparse_kd_loss
from stillroom.kernels.targets import SparseTargets

ENTRIES, DRAWS, ALPHA = 12, 50, 0.3
OURS, LIGER = "sparse_kd_loss, in place", "Liger fused cross-entropy, in place"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured: rows, vocabulary, widths of the fused head, and how often."""

    rows: int = 8192
    vocabulary: int = 128_256
    widths: tuple[int, ...] = (2048, 4096)
    repeats: int = 30


TINY = Sizes(rows=6, vocabulary=200, widths=(16,), repeats=1)


@dataclass(frozen=True, slots=True)
class Bench:
    """One device, its two ceilings measured in this run, and how to time on it."""

    device: torch.device
    sizes: Sizes
    bytes_per_s: float
    flops_per_s: float

    def milliseconds(self, variants: dict[str, Callable[[], Any]], setup: Callable[[], None]) -> dict[str, float]:
        """Medians, variants in turn; `setup` restores what a variant overwrites and is not timed."""
        times: dict[str, list[float]] = {name: [] for name in variants}
        for repeat in range(self.sizes.repeats + 2):
            for name, function in variants.items():
                setup()
                took_ms = self._once(function)
                if repeat >= 2:
                    times[name].append(took_ms)
        return {name: statistics.median(values) for name, values in times.items()}

    def _once(self, function: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak_mib(self, function: Callable[[], Any]) -> float | None:
        """Most memory allocated during `function` above what was there before."""
        if self.device.type != "cuda":
            function()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes a second of a large copy (reads plus writes) and bf16 operations a second of a large product."""
    if device.type != "cuda":
        return 1e10, 1e11
    source, target = (torch.randn(1 << 29, device=device) for _ in range(2))
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    bench = Bench(device, Sizes(), 0.0, 0.0)
    seconds = bench.milliseconds({"copy": lambda: target.copy_(source), "product": lambda: left @ right}, lambda: None)
    return 2 * source.nbytes / seconds["copy"] * 1e3, 2 * 8192**3 / seconds["product"] * 1e3


def make_targets(rows: int, vocabulary: int, device: torch.device) -> tuple[SparseTargets, Tensor]:
    """Targets of `ENTRIES` ids a row and labels."""
    generator = torch.Generator().manual_seed(0)
    ids_NE = torch.randint(0, vocabulary // ENTRIES, (rows, ENTRIES), generator=generator)
    ids_NE += torch.arange(ENTRIES) * (vocabulary // ENTRIES)  # one in each part of the vocabulary: unique
    weights_NE = torch.rand(rows, ENTRIES, generator=generator).softmax(1)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    zeros_N = torch.zeros(rows)
    offsets = torch.arange(rows + 1) * ENTRIES
    targets = SparseTargets(
        offsets, ids_NE.flatten().int(), weights_NE.flatten(), zeros_N, zeros_N, weights_NE.flatten().log()
    )
    return targets.to(device), labels_N.to(device)


def liger() -> Any:
    """Liger's functional module, or None where it is not installed."""
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        return None
    return functional


def loss(bench: Bench) -> dict[str, Any]:
    """Forward and backward of the loss on materialised bf16 logits."""
    rows, vocabulary = bench.sizes.rows, bench.sizes.vocabulary
    targets, labels_N = make_targets(rows, vocabulary, bench.device)
    kept_NV = torch.randn(rows, vocabulary, device=bench.device, dtype=torch.bfloat16) * 3
    logits_NV = kept_NV.clone()
    ids_NE = targets.ids.long().view(rows, ENTRIES)
    weights_NE = targets.weights.view(rows, ENTRIES)

    def eager(leaf_NV: Tensor) -> Tensor:
        logq_NV = F.log_softmax(leaf_NV.float(), 1)
        ce_N = -logq_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
        kd_N = (weights_NE * (weights_NE.log() - logq_NV.gather(1, ids_NE))).sum(1)
        return (ALPHA * ce_N + (1 - ALPHA) * kd_N).mean()

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            leaf_NV = logits_NV.detach().requires_grad_()
            function(leaf_NV).backward()  # type: ignore[no-untyped-call]

        return run

    def ours(name: str, inplace: bool) -> Callable[[], None]:
        return step(
            lambda leaf_NV: (
                sparse_kd_loss(
                    leaf_NV, targets, labels_N, alpha=ALPHA, divergence=name, inplace=inplace, impl=_impl(bench)
                ).loss
            )
        )

    variants: dict[str, Callable[[], Any]] = {
        OURS: ours("forward_kl", True),
        "sparse_kd_loss": ours("forward_kl", False),
        "sparse_kd_loss, JSD, in place": ours("jsd", True),
        "F.cross_entropy, logits.float()": step(lambda leaf_NV: F.cross_entropy(leaf_NV.float(), labels_N)),
        "KD by autograd (log_softmax + gather)": step(eager),
    }
    if bench.device.type == "cuda":
        variants["KD by torch.compile"] = step(torch.compile(eager))
        if (rival := liger()) is not None:
            variants[LIGER] = step(lambda leaf_NV: rival.liger_cross_entropy(leaf_NV, labels_N))
    times = bench.milliseconds(variants, lambda: logits_NV.copy_(kept_NV))
    floor_ms = 2 * kept_NV.nbytes / bench.bytes_per_s * 1e3
    return {"ms": times, "floor_ms": floor_ms, "peak_mib": {name: bench.peak_mib(variants[name]) for name in variants}}


def fused(bench: Bench, width: int) -> dict[str, Any]:
    """Forward and backward of head and loss in one."""
    rows, vocabulary = bench.sizes.rows, bench.sizes.vocabulary
    targets, labels_N = make_targets(rows, vocabulary, bench.device)
    hidden_ND = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16).requires_grad_()
    weight_VD = (
        torch.randn(vocabulary, width, device=bench.device, dtype=torch.bfloat16) / width**0.5
    ).requires_grad_()

    def clear() -> None:
        hidden_ND.grad = weight_VD.grad = None

    def ours() -> None:
        fused_linear_sparse_kd(hidden_ND, weight_VD, targets, labels_N, alpha=ALPHA, impl=_impl(bench)).loss.backward()  # type: ignore[no-untyped-call]

    def apart() -> None:
        logits_NV = hidden_ND @ weight_VD.T
        sparse_kd_loss(logits_NV, targets, labels_N, alpha=ALPHA, impl=_impl(bench)).loss.backward()  # type: ignore[no-untyped-call]

    variants: dict[str, Callable[[], Any]] = {
        "fused_linear_sparse_kd": ours,
        "head, then sparse_kd_loss": apart,
        "head, then F.cross_entropy": lambda: F.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N).backward(),  # type: ignore[no-untyped-call]
    }
    if bench.device.type == "cuda" and (rival := liger()) is not None:
        variants["Liger fused linear cross-entropy"] = lambda: rival.liger_fused_linear_cross_entropy(
            hidden_ND, weight_VD, labels_N
        ).backward()
    times = bench.milliseconds(variants, clear)
    peaks = {}
    for name, function in variants.items():
        clear()
        peaks[name] = bench.peak_mib(function)
    floor_ms = 6 * rows * vocabulary * width / bench.flops_per_s * 1e3
    formula = peak_bytes(rows, vocabulary, width, torch.bfloat16) / 2**20
    return {"ms": times, "floor_ms": floor_ms, "peak_mib": peaks, "peak_formula_mib": formula}


def sampler(bench: Bench) -> dict[str, Any]:
    """The samplers on fp32 and bf16 logits."""
    from benchmarks.kernels import teacher_rows

    rows, vocabulary = bench.sizes.rows, bench.sizes.vocabulary
    some = teacher_rows(min(rows, 512), vocabulary).to(bench.device)
    logits_NV = some.repeat(-(-rows // len(some)), 1)[:rows]
    labels_N, sequence_N, row_N = (
        torch.zeros(rows, dtype=torch.int64, device=bench.device),
        torch.arange(rows, device=bench.device) // 2048,
        torch.arange(rows, device=bench.device) % 2048,
    )
    figures: dict[str, Any] = {"ms": {}}
    for dtype in (torch.float32, torch.bfloat16):
        cast_NV = logits_NV.to(dtype)

        def draw(kind: str, cast_NV: Tensor = cast_NV) -> Callable[[], Any]:
            keys = {"sequence_N": sequence_N, "row_N": row_N}
            return lambda: sample(cast_NV, labels_N, kind=kind, draws=DRAWS, seed=0, impl=_impl(bench), **keys)

        variants = {kind: draw(kind) for kind in ("threshold", "random", "systematic", "top_k")}
        variants["softmax + torch.multinomial"] = lambda cast_NV=cast_NV: torch.multinomial(
            cast_NV.float().softmax(1), DRAWS, replacement=True
        )
        figures["ms"][str(dtype).removeprefix("torch.")] = bench.milliseconds(variants, lambda: None)
    figures["floor_ms"] = {
        name: 2 * rows * vocabulary * size / bench.bytes_per_s * 1e3 for name, size in (("float32", 4), ("bfloat16", 2))
    }
    return figures


def measure(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Everything."""
    bench = Bench(device, sizes, *ceilings(device))
    return {
        "rows": sizes.rows,
        "vocabulary": sizes.vocabulary,
        "entries_per_row": ENTRIES,
        "copy_bytes_per_s": bench.bytes_per_s,
        "product_flops_per_s": bench.flops_per_s,
        "liger": liger() is not None,
        "loss": loss(bench),
        "fused_linear": {str(width): fused(bench, width) for width in sizes.widths},
        "sampler": sampler(bench),
    }


def page(figures: dict[str, Any]) -> str:
    """The page's body."""
    times, floor = figures["loss"]["ms"], figures["loss"]["floor_ms"]
    loss_rows = [[n, f"{ms:.2f}", f"{ms / floor:.2f}", _mib(figures["loss"]["peak_mib"][n])] for n, ms in times.items()]
    ours, rival = times[OURS], times.get(LIGER)
    verdicts = [("sparse_kd, in place, over one read and one write", ours / floor, 1.3)]
    if rival is not None:
        verdicts.append(("sparse_kd over Liger's cross-entropy on the same logits", ours / rival, 1.05))
    head_rows = []
    for width, head in figures["fused_linear"].items():
        for name, ms in head["ms"].items():
            head_rows.append(
                [f"D = {width}", name, f"{ms:.1f}", f"{ms / head['floor_ms']:.2f}", _mib(head["peak_mib"][name])]
            )
        mine = head["ms"]["fused_linear_sparse_kd"]
        verdicts.append((f"fused_linear, D = {width}, over three products", mine / head["floor_ms"], 1.2))
        if (peak := head["peak_mib"]["fused_linear_sparse_kd"]) is not None:
            verdicts.append(
                (f"fused_linear, D = {width}, memory over its formula", peak / head["peak_formula_mib"], 1.1)
            )
        if (other := head["ms"].get("Liger fused linear cross-entropy")) is not None:
            verdicts.append((f"fused_linear, D = {width}, over Liger's", mine / other, 1.0))
    draws = figures["sampler"]["ms"]
    draw_rows = [[n, *(f"{ms[n]:.2f}" for ms in draws.values())] for n in next(iter(draws.values()))]
    scale = figures["rows"] / 8192
    verdicts += [
        (f"sample, {kind}, ms for 8,192 float32 rows", draws["float32"][kind] / scale, 3.0)
        for kind in ("threshold", "random")
    ]
    judged = [[n, f"{got:.2f}", f"{most:g}", "met" if got <= most else "**missed**"] for n, got, most in verdicts]
    return f"""
{figures["rows"]:,} rows, V = {figures["vocabulary"]:,}, bf16 logits, {figures["entries_per_row"]} entries per row,
alpha = {ALPHA}; medians of CUDA events, variants in turn. Ceilings measured in this run: copy
{figures["copy_bytes_per_s"] / 1e12:.2f} TB/s (reads and writes), bf16 product
{figures["product_flops_per_s"] / 1e12:.0f} TFLOP/s.
{"" if figures["liger"] else "Liger-Kernel was not installed."}

{report.table(["", "measured", "at most", ""], judged)}

## Loss on logits

{report.table(["forward + backward", "ms", "x floor", "peak MiB above the logits"], loss_rows)}

## Fused head

{report.table(["", "forward + backward", "ms", "x three products", "peak MiB"], head_rows)}

## Sampler

{DRAWS} draws; log-probabilities, label and entropy included.

{report.table(["ms", *draws], draw_rows)}
"""


def _impl(bench: Bench) -> str:
    return "triton" if bench.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "reference"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
