"""The loss and the samplers: `python -m benchmarks.kernels` writes docs/benchmarks/kernels.{json,md} on a CPU, in two minutes.

On a CUDA device it measures the Triton kernels instead (`kernels_gpu`).

Shapes: `N` rows, `V` vocabulary, `K` entries of a row.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import kernels_gpu, report
from stillroom.kernels.sample import rows as compiled
from stillroom.kernels.sample import sample
from stillroom.kernels.sparse_kd import sparse_kd_loss
from stillroom.kernels.targets import SparseTargets

ROWS, VOCABULARY, KEPT, ALPHA = 512, 32_000, 50, 0.3
DRAWS = 50
SAMPLER_SHAPES = ((4_096, 2_048), (32_000, 256), (128_256, 64))  # (V, N): 8 M logits each
SAMPLER_KINDS = ("threshold", "systematic", "stratified", "random", "top_k")
IN_PYTORCH = " in PyTorch"  # behind a kind: impl="reference" instead of the compiled loops
CROSS_ENTROPY = "F.cross_entropy"
SOFTMAX = "softmax alone"
MULTINOMIAL = "softmax + torch.multinomial"


def teacher_rows(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    """`[N, V]` logits of Zipf-Mandelbrot distributions p ~ (rank - 1 + b)**-s, ids shuffled.

    s = 1.835 - 0.261 z and b = exp(-0.299 + 0.869 z) with z normal: fitted to the published mean number of distinct ids
    among N draws of a language model's distribution; 12.1 at N = 50.
    """
    generator = torch.Generator().manual_seed(seed)
    z_N1 = torch.randn(rows, 1, generator=generator)
    slope_N1, shift_N1 = (1.835 - 0.261 * z_N1).clamp_min(0.3), torch.exp(-0.299 + 0.869 * z_N1)
    logits_NV = -slope_N1 * torch.log(torch.arange(vocabulary) + shift_N1)
    return logits_NV[:, torch.randperm(vocabulary, generator=generator)].contiguous()


def loss_variants(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Forward and backward of every loss on the same leaf; the gradient is dropped before each."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (torch.randn(ROWS, VOCABULARY, generator=generator) * 3).to(dtype).requires_grad_()
    ids_NK = torch.rand(ROWS, VOCABULARY, generator=generator).topk(KEPT, 1).indices
    weights_NK = torch.rand(ROWS, KEPT, generator=generator).softmax(1)
    labels_N = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    none_N = torch.zeros(ROWS)
    targets = SparseTargets(torch.arange(ROWS + 1) * KEPT, ids_NK.flatten().int(), weights_NK.flatten(), none_N, none_N)

    def naive() -> Tensor:
        logq_NV = F.log_softmax(logits_NV.float(), 1)
        ce_N = -logq_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
        kd_N = (torch.xlogy(weights_NK, weights_NK) - weights_NK * logq_NV.gather(1, ids_NK)).sum(1)
        return (ALPHA * ce_N + (1 - ALPHA) * kd_N).mean()

    def fused(missing: str = "truncate") -> Tensor:
        return sparse_kd_loss(logits_NV, targets, labels_N, alpha=ALPHA, missing=missing).loss

    def backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            logits_NV.grad = None
            loss().backward()  # type: ignore[no-untyped-call]

        return step

    return {
        name: backward(loss)
        for name, loss in {
            CROSS_ENTROPY: lambda: F.cross_entropy(logits_NV, labels_N),
            "F.cross_entropy, logits.float()": lambda: F.cross_entropy(logits_NV.float(), labels_N),
            "KD by autograd (log_softmax + gather)": naive,
            "sparse_kd_loss": fused,
            "sparse_kd_loss, tail_bucket": lambda: fused("tail_bucket"),
        }.items()
    }


def sampler_variants(vocabulary: int, rows: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Every sampler on the same rows, and the mean number of entries `threshold` keeps."""
    logits_NV = teacher_rows(rows, vocabulary)
    labels_N, sequence_N, row_N = (
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows) // 512,
        torch.arange(rows) % 512,
    )

    def draw(kind: str, impl: str = "auto") -> Callable[[], SparseTargets]:
        keys: dict[str, Any] = dict(sequence_N=sequence_N, row_N=row_N)
        return lambda: sample(logits_NV, labels_N, kind=kind, draws=DRAWS, seed=0, impl=impl, **keys)

    variants: dict[str, Callable[[], Any]] = {
        SOFTMAX: lambda: torch.softmax(logits_NV, 1),
        MULTINOMIAL: lambda: torch.multinomial(torch.softmax(logits_NV, 1), DRAWS, replacement=True),
    }
    variants |= {kind: draw(kind) for kind in SAMPLER_KINDS}
    if compiled.COMPILED:
        variants |= {kind + IN_PYTORCH: draw(kind, "reference") for kind in compiled.KINDS}
    return variants, draw("threshold")().ids.numel() / rows


def measure(threads: int, repeats: int) -> dict[str, Any]:
    """Everything, in milliseconds and microseconds."""
    figures: dict[str, Any] = {
        "loss": {"rows": ROWS, "vocabulary": VOCABULARY, "entries_per_row": KEPT, "alpha": ALPHA, "ms": {}},
        "sampler": {
            "draws": DRAWS,
            "compiled": compiled.COMPILED,
            "us_per_row": {},
            "wall_us_per_row": {},
            "entries_per_row": {},
        },
        "repeats": repeats,
        "load_average": round(os.getloadavg()[0], 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        for dtype in (torch.float32, torch.bfloat16):
            seconds = report.interleaved(loss_variants(dtype), repeats)
            key = f"{str(dtype).removeprefix('torch.')}, {count} thread{'s' * (count > 1)}"
            figures["loss"]["ms"][key] = {name: round(value * 1e3, 1) for name, value in seconds.items()}
    torch.set_num_threads(1)
    for vocabulary, rows in SAMPLER_SHAPES:
        variants, entries = sampler_variants(vocabulary, rows)
        seconds = report.interleaved(variants, repeats, clock=time.process_time)
        figures["sampler"]["us_per_row"][str(vocabulary)] = {
            name: round(value / rows * 1e6, 1) for name, value in seconds.items()
        }
        figures["sampler"]["entries_per_row"][str(vocabulary)] = round(entries, 1)
    torch.set_num_threads(threads)
    for vocabulary, rows in SAMPLER_SHAPES:
        seconds = report.interleaved(sampler_variants(vocabulary, rows)[0], repeats)
        figures["sampler"]["wall_us_per_row"][str(vocabulary)] = {
            name: round(value / rows * 1e6, 1) for name, value in seconds.items()
        }
    return figures


def page(figures: dict[str, Any]) -> str:
    """The page's body."""
    loss, sampler = figures["loss"], figures["sampler"]
    names = next(iter(loss["ms"].values()))
    cells = {
        name: [f"{times[name]:.0f} ({times[name] / times[CROSS_ENTROPY]:.2f})" for times in loss["ms"].values()]
        for name in names
    }
    loss_table = report.table(
        ["forward + backward, ms (x F.cross_entropy)", *loss["ms"]], [[n, *c] for n, c in cells.items()]
    )
    per_row = sampler["us_per_row"]
    sampler_table, wall_table = (
        report.table(
            ["us per row (x multinomial)", *(f"V = {int(v):,}" for v in by_vocabulary)],
            [
                [
                    name,
                    *(
                        f"{times[name]:.1f} ({times[name] / times[MULTINOMIAL]:.2f})"
                        for times in by_vocabulary.values()
                    ),
                ]
                for name in next(iter(by_vocabulary.values()))
            ],
        )
        for by_vocabulary in (per_row, sampler["wall_us_per_row"])
    )
    ratios = {
        key: times["sparse_kd_loss"] / times[CROSS_ENTROPY] for key, times in loss["ms"].items() if "float32" in key
    }
    verdict = "\n".join(
        f"- {key}: {ratio:.2f} of `F.cross_entropy`, {'within' if ratio <= 0.6 else '**over**'} the 0.6 asked for"
        for key, ratio in ratios.items()
    )
    kept = ", ".join(f"{entries} (V = {int(v):,})" for v, entries in sampler["entries_per_row"].items())
    loops = "`rows.c`, compiled" if sampler["compiled"] else "PyTorch too: nothing was compiled here"
    per_logit = statistics.median(times["threshold"] * 1e3 / int(v) for v, times in per_row.items())
    return f"""
Measured on a CPU: no CUDA GPU was at hand for this page. What runs is `reference.py` of each family, plain PyTorch, and for
the samplers {loops}. The Triton kernels are held equal to it in Triton's interpreter and compiled
for a GPU without one, but their speed has not been measured: where there is a CUDA device the same command measures it and
writes a page of its own.
Load average {figures["load_average"]} on {figures["cores"]} cores before the run.
Medians of {figures["repeats"]} runs, variants in turn.

## Loss

{loss["rows"]} rows, V = {loss["vocabulary"]:,}, {loss["entries_per_row"]} entries per row, alpha = {loss["alpha"]}.

{loss_table}

{verdict}

One softmax is written straight into the gradient's buffer and scaled, and a few values are corrected. Where other work
holds a core, several threads can lose to one: they wait for the slowest at the end of every operation.
`F.cross_entropy` on bfloat16 logits rounds its log-probabilities to bfloat16; ours
computes in float32 and rounds the gradient once, so `logits.float()` is the fair neighbour there. An
upstream gradient other than 1 (a loss divided by accumulation steps) costs one more pass over the gradient; put the
factor into `row_weights_N` instead.

## Sampler

float32 logits, {sampler["draws"]} draws, CPU time of one thread; log-probabilities, label and entropy included. Teacher rows are
Zipf-Mandelbrot; `threshold` keeps this many entries of a row: {kept}.

{sampler_table}

The same by the clock, on all threads PyTorch uses here:

{wall_table}

`threshold` takes about {per_logit:.1f} ns per logit. Part of that is the price of whole numbers and of an exponential spelled out
in single-precision additions and multiplications, so that a row's draws are the same bits in any batch, on any number
of threads and on a GPU; `torch.multinomial` promises none of this and returns ids only.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="go through the GPU benchmark at toy sizes; write nothing")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.tiny:
        print(kernels_gpu.page(kernels_gpu.measure(kernels_gpu.TINY, device)))
    elif device.type == "cuda":
        figures = kernels_gpu.measure(kernels_gpu.Sizes(), device)
        name = torch.cuda.get_device_name().split()[-1].lower()
        title = "Kernels on a GPU: loss, fused head, samplers"
        report.save(f"kernels-{name}", title, "python -m benchmarks.kernels", figures, kernels_gpu.page(figures))
    else:
        figures = measure(torch.get_num_threads(), repeats=7)
        title = "Kernels on a CPU: loss and samplers"
        report.save("kernels", title, "python -m benchmarks.kernels", figures, page(figures))


if __name__ == "__main__":
    main()
