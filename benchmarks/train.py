"""What a training step from a cache costs over one from the text alone: `python -m benchmarks.train` (`make bench-train`).

Two sides, in turn, step by step, on the same student, batches and head: cross-entropy with the labels, and KL to the cached
targets. Each step is the whole of it: reading and decoding the batch, forward, backward, clipping, optimizer. Random weights
and synthetic targets of a real teacher's sizes serve: speed does not depend on them.

Shapes: `B` sequences, `L` positions, `V` vocabulary, `D` width.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.report import figures_of, render, save, table
from benchmarks.synthetic import SyntheticTeacher
from stillroom.kernels.fused_linear import peak_bytes
from stillroom.storage.cache import Cache, open_cache
from stillroom.storage.manifest import CorpusInfo, Manifest, PackingInfo, TeacherInfo, TokenizerInfo
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.stream import StreamOrder
from stillroom.storage.writer import CacheWriter
from stillroom.train.batch import Batch
from stillroom.train.data import CacheDataset, OrderSampler, loader_of, order_of
from stillroom.train.fused import Head, find_head, with_loss, without_loss
from stillroom.train.objective import Objective
from stillroom.train.optim import fast_bfloat16, make_optimizer

TITLE: Final = "A training step from a cache beside one from the text"
DRAWS: Final = 50
WAIT_LIMIT: Final = 0.005
RESUME_LIMIT_S: Final = 2.0
WAIT_CAUSE: Final = """
The cause: reading and decoding the batch is most of the wait (about 1 ms here) and nothing else can run meanwhile, since all
cores train. Tried: one and two loader processes (`--workers`), which take cores from the step and hand a batch over no
faster than it is read here: 1.6 % and 1.2 % (2026-11-25, `--dry`). A step of a larger student hides it.
"""
BILLION: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Shape:
    """A student and its batches.

    Attributes:
        limit: most that a step from the cache may cost over one from the text.
        workers: processes that read ahead.
    """

    name: str
    model: dict[str, int] = field(hash=False)
    seq_len: int
    batch_size: int
    steps: int
    limit: float
    workers: int
    fused: bool


DEMO: Final = Shape(
    "demo student (2 layers, width 128, V = 4,096)",
    dict(vocab_size=4096, hidden_size=128, intermediate_size=336, num_hidden_layers=2, num_attention_heads=4,
         num_key_value_heads=4),
    seq_len=256, batch_size=16, steps=60, limit=0.10, workers=0, fused=False,
)  # fmt: skip
LARGE: Final = Shape(
    "300M-shaped student (24 layers, width 1,024, V = 128,256)",
    dict(vocab_size=128256, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
         num_key_value_heads=8),
    seq_len=2048, batch_size=16, steps=60, limit=0.01, workers=2, fused=True,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="steps of each side, for a quick look")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--fused", action="store_true", help="the fused head on a CPU too")
    parser.add_argument("--workers", type=int, help="processes that read ahead")
    parser.add_argument("--dry", action="store_true", help="print, and keep nothing")
    parser.add_argument("--render", action="store_true", help="write the page again from kept figures")
    given = parser.parse_args()
    name, shape = ("train-h200", LARGE) if torch.cuda.is_available() else ("train", DEMO)
    if given.render:
        render(name, TITLE, page(figures_of(name)))
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    workers = shape.workers if given.workers is None else given.workers
    shape = replace(shape, steps=given.steps or shape.steps, fused=shape.fused or given.fused, workers=workers)
    figures = measure(shape)
    if given.dry:
        print(page(figures))
    else:
        save(name, TITLE, "make bench-train", figures, page(figures))


def measure(shape: Shape) -> dict[str, Any]:
    """Seconds of each side's steps, the share spent waiting for data, memory of the head, cost of going on."""
    with tempfile.TemporaryDirectory() as folder:
        cache = _write_cache(shape, Path(folder))
        figures = {
            "student": shape.name,
            "seq_len": shape.seq_len,
            "batch_size": shape.batch_size,
            "limit": shape.limit,
        }
        figures |= {"threads": torch.get_num_threads(), "workers": shape.workers, "fused": shape.fused}
        return figures | steps(shape, cache) | {"head": head_memory(shape), "resume_s": resume_costs()}


def steps(shape: Shape, cache: Cache) -> dict[str, Any]:
    """Both sides in turn, a step each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    model = _student(shape).to(device)
    optimizer = make_optimizer(model, name="adamw", lr=1e-4, embedding_lr=1e-4, weight_decay=0.1)
    head = find_head(model) if shape.fused else None
    sides: dict[str, tuple[Objective, Iterator[Batch]]] = {}
    for name, with_targets in (("text", False), ("cache", True)):
        objective = Objective(name="forward_kl" if with_targets else "ce", vocab_size=shape.model["vocab_size"])
        source = CacheDataset(cache, with_targets=with_targets)
        order = OrderSampler(order_of(source, seed=0), batch_size=shape.batch_size, steps=1 << 40)
        sides[name] = objective, iter(loader_of(source, order, workers=shape.workers))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    waits: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(shape.steps + 3):
        for name, (objective, batches) in sides.items():
            with_loss(model, objective, head, dtype)
            _wait(device)
            begun_s = time.perf_counter()
            batch = next(batches)
            got_s = time.perf_counter()
            loss, *_ = model(batch=batch.to(device), rows=float(batch.mask_BL.sum()), step=0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            _wait(device)
            done_s = time.perf_counter()
            if number >= 3:  # the first ones warm up
                seconds[name].append(done_s - begun_s)
                waits[name].append(got_s - begun_s)
            without_loss(model)
    ratios = [b / a - 1 for a, b in zip(seconds["text"], seconds["cache"], strict=True)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "entries_per_row": cache.entries / (len(cache) * shape.seq_len),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "wait_s": {name: statistics.median(values) for name, values in waits.items()},
        "overhead": statistics.median(ratios),
        "overhead_of_medians": statistics.median(seconds["cache"]) / statistics.median(seconds["text"]) - 1,
        "data_wait": sum(waits["cache"]) / sum(seconds["cache"]),
    }


def head_memory(shape: Shape) -> dict[str, Any] | None:
    """Peak of the fused head's forward beside `peak_bytes`, and what whole logits take; on a CUDA device only."""
    if not torch.cuda.is_available():
        return None
    rows, vocabulary, width = shape.batch_size * shape.seq_len, shape.model["vocab_size"], shape.model["hidden_size"]
    weight_VD = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    states_ND = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels_BL = torch.randint(0, vocabulary, (shape.batch_size, shape.seq_len), device="cuda")
    batch = Batch(labels_BL, labels_BL, torch.ones_like(labels_BL, dtype=torch.bool))
    objective = Objective(name="ce", vocab_size=vocabulary)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head = Head()
    objective.fused(states_ND, weight_VD, None, batch, float(rows), 0, logit_scale=head.scale, softcap=head.softcap)
    return {
        "rows": rows,
        "measured_bytes": torch.cuda.max_memory_allocated() - before,
        "formula_bytes": peak_bytes(rows, vocabulary, width, torch.bfloat16),
        "logits_bytes": rows * vocabulary * 2,
    }


def resume_costs() -> dict[str, float]:
    """Seconds until the first batch's numbers are known, at several steps of 1 B rows in sequences of 2,048; no data."""
    sequences, shard, batch_size = BILLION // 2048, 4096, 256
    lengths = [shard] * (sequences // shard) + [sequences % shard]
    found = {}
    for share in (0.0, 0.5, 0.999, 7.3):  # the last one in the eighth epoch
        step = int(share * sequences / batch_size)
        begun_s = time.perf_counter()
        order = StreamOrder(lengths, seed=0, window=None)
        sampler = OrderSampler(order, batch_size=batch_size, steps=step + 1, first_step=step)
        first = next(iter(sampler))
        found[str(step)] = time.perf_counter() - begun_s
        assert len(first) == batch_size
    return found


def page(figures: dict[str, Any]) -> str:
    """The page's body, from figures alone."""
    seconds, waits, overhead, limit = (figures[k] for k in ("seconds", "wait_s", "overhead", "limit"))
    rows = figures["batch_size"] * figures["seq_len"]
    sides = [(name, f"{1e3 * s:.1f}", f"{1e3 * waits[name]:.2f}", f"{rows / s:,.0f}") for name, s in seconds.items()]
    head = "fused" if figures["fused"] else "of whole logits"
    resume = [(f"{int(step):,}", f"{1e3 * s:.1f}") for step, s in figures["resume_s"].items()]
    worst = max(figures["resume_s"].values())
    memory = ""
    if figures["head"] is not None:
        found = figures["head"]
        memory = f"""
The fused head over {found["rows"]:,} rows takes {found["measured_bytes"] / 2**20:,.0f} MiB beyond its arguments; the formula
(`kernels/fused_linear/plan.py`) says {found["formula_bytes"] / 2**20:,.0f} MiB. The logits alone would be
{found["logits_bytes"] / 2**20:,.0f} MiB.
"""
    return f"""
{figures["student"]}, {figures["dtype"]} products, batches of {figures["batch_size"]} sequences of {figures["seq_len"]:,}, loss
{head}, targets with {figures["entries_per_row"]:.1f} entries a row (`threshold`, N = {DRAWS}), {figures["threads"]} CPU threads,
{figures["workers"]} loader workers. The two sides in turn, a step each, on one student.

{table(("targets from", "ms a step", "of it waiting for data", "rows/s"), sides)}

Median over pairs of steps: the cache costs **{overhead:.1%}** more than the text; wanted at most {limit:.0%}:
{"met" if overhead <= limit else "not met"}. Waiting for data is {figures["data_wait"]:.2%} of the cache's steps; wanted at most
{WAIT_LIMIT:.1%}: {"met" if figures["data_wait"] <= WAIT_LIMIT else "not met"}.
{"" if figures["data_wait"] <= WAIT_LIMIT or figures["workers"] else WAIT_CAUSE}
{memory}
Going on in the middle of 1 B rows (no data is read: from the step's number to its sequence numbers), wanted below
{RESUME_LIMIT_S:.0f} s: {"met" if worst < RESUME_LIMIT_S else "not met"}.

{table(("step", "ms"), resume)}
"""


def _student(shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**shape.model, max_position_embeddings=shape.seq_len, tie_word_embeddings=True, bos_token_id=0)
    ).train()


def _write_cache(shape: Shape, root: Path) -> Cache:
    """Sequences for some twenty batches, of a synthetic teacher with a real one's entries a row."""
    vocabulary, sequences = shape.model["vocab_size"], 20 * shape.batch_size
    spec = SamplerSpec(draws=DRAWS)
    manifest = Manifest(
        teacher=TeacherInfo(
            name="synthetic", revision=None, fingerprint="s" * 64, vocab_size=vocabulary, dtype="float32"
        ),
        tokenizer=TokenizerInfo(fingerprint="s" * 64, vocab_size=vocabulary),
        corpus=CorpusInfo(
            name="synthetic", fingerprint="s" * 64, documents=sequences, tokens=sequences * shape.seq_len
        ),
        packing=PackingInfo(seq_len=shape.seq_len),
        sampler=spec,
        vocab_size=vocabulary,
        sequences=sequences,
        sequences_per_shard=4 * shape.batch_size,
    )
    teacher, rng = SyntheticTeacher(vocab_size=vocabulary), np.random.default_rng(0)
    writer = CacheWriter(root, manifest)
    for shard in range(manifest.shards):
        start, stop = manifest.shard_range(shard)
        tokens_SL1, targets = teacher.sequences(spec, stop - start, shape.seq_len)
        rounding_R3 = rng.random((targets.rows, 3), dtype=np.float32)
        writer.write_shard(shard, tokens_SL1, targets, rounding_R3)
    return open_cache(root, columns=("tokens",))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
