"""What stage one costs beside its teacher: `python -m benchmarks.cache` (`make bench-cache`).

Two sides, in turn, on the same batches in the same process: the teacher's bare forward with its head, logits thrown away; and
`run_shards`, all of stage one, down to committed shards. Random weights serve: speed does not depend on them, but the sampler's
does on how peaked the distribution is, so the head is scaled until a row keeps about as many entries as a trained teacher's.

Shapes: `S` sequences, `L` rows of a sequence, `B` sequences of a batch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.report import figures_of, render, save, table
from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.prepare import Prepared, prepare
from stillroom.pipeline.run import RunStats, run_shards
from stillroom.pipeline.stages import Batch
from stillroom.storage.cache import open_cache

TITLE: Final = "Stage one beside its teacher's bare forward"
DRAWS: Final = 50
LOGIT_DEVIATION: Final = 5.5  # makes random logits keep about as many entries a row as a trained teacher does


@dataclass(frozen=True, slots=True)
class Shape:
    """A teacher and how much it is asked.

    Attributes:
        limit: most that stage one may cost over the bare forward.
    """

    name: str
    model: dict[str, int]
    seq_len: int
    batch_size: int
    sequences: int
    repeats: int
    limit: float


DEMO: Final = Shape(
    "demo teacher (4 layers, width 256, V = 4,096)",
    dict(vocab_size=4096, hidden_size=256, intermediate_size=672, num_hidden_layers=4, num_attention_heads=4,
         num_key_value_heads=4),
    seq_len=256, batch_size=8, sequences=256, repeats=5, limit=0.15,
)  # fmt: skip
LARGE: Final = Shape(
    "8B-shaped teacher (32 layers, width 4,096, V = 128,256, bfloat16)",
    dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
         num_key_value_heads=8),
    seq_len=4096, batch_size=4, sequences=64, repeats=3, limit=0.03,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, help="sequences of a run, for a quick look")
    parser.add_argument("--repeats", type=int, help="runs of each side")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--render", action="store_true", help="write the page again from kept figures")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    name, shape = ("cache-h200", LARGE) if on_gpu else ("cache", DEMO)
    if given.render:
        render(name, TITLE, page(figures_of(name)))
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    shape = replace(shape, sequences=given.sequences or shape.sequences, repeats=given.repeats or shape.repeats)
    figures = measure(shape)
    save(name, TITLE, "make bench-cache", figures, page(figures))


def measure(shape: Shape) -> dict[str, Any]:
    """Rates of both sides, interleaved, and the stages of the last run."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = _prepared(shape, Path(folder))
        seconds: dict[str, list[float]] = {"bare": [], "stage one": []}
        stats = RunStats()
        for repeat in range(shape.repeats + 1):
            bare_s = bare_forward(prepared)
            start_s = time.perf_counter()
            stats = run_shards(prepared, range(prepared.manifest.shards))
            full_s = time.perf_counter() - start_s
            if repeat:  # the first of each warms up
                seconds["bare"].append(bare_s)
                seconds["stage one"].append(full_s)
            cache = open_cache(Path(folder) / "cache")
            rows = len(cache) * shape.seq_len
            entries, size = cache.entries / rows, sum(cache.bytes_by_array().values()) / rows
            for part in ("shards", "commits"):
                shutil.rmtree(Path(folder) / "cache" / part)
        medians = {side: statistics.median(values) for side, values in seconds.items()}
        return {
            "teacher": shape.name,
            "seq_len": shape.seq_len,
            "batch_size": shape.batch_size,
            "rows": rows,
            "repeats": shape.repeats,
            "threads": torch.get_num_threads(),
            "entries_per_row": entries,
            "bytes_per_row": size,
            "seconds": seconds,
            "rows_per_s": {side: rows / median for side, median in medians.items()},
            "overhead": statistics.median(b / a - 1 for a, b in zip(seconds["bare"], seconds["stage one"])),
            "limit": shape.limit,
            "stages_s": stats.stages,
            "stage_one_s": stats.seconds,
            "peak_host_bytes": stats.peak_host_bytes,
            "peak_device_bytes": stats.peak_device_bytes,
        }


@torch.inference_mode()
def bare_forward(prepared: Prepared) -> float:
    """Seconds of body and head over the corpus, in the run's own batches, one sequence of logits alive at a time."""
    teacher = prepared.teacher()
    start_s, room = time.perf_counter(), None
    for batch in Batch(0, prepared.corpus.tokens_SL1).split(prepared.config.batch_size):
        tokens_BL = torch.from_numpy(batch.tokens_BL1[:, :-1].astype(np.int64))
        for states_LX in teacher.body(tokens_BL):
            room = teacher.head(states_LX, out=room)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def page(figures: dict[str, Any]) -> str:
    """The page's body, from figures alone."""
    rates, overhead, limit = figures["rows_per_s"], figures["overhead"], figures["limit"]
    sides = [(side, f"{rate:,.0f}", f"{rates['bare'] / rate - 1:.1%}") for side, rate in rates.items()]
    stages = [(name, f"{s:.2f}", f"{s / figures['stage_one_s']:.1%}") for name, s in figures["stages_s"].items()]
    device = figures["peak_device_bytes"]
    memory = f"{figures['peak_host_bytes'] / 2**30:.2f} GiB of host memory"
    memory += f" and {device / 2**30:.1f} GiB of the device's" if device else ""
    return f"""
{figures["teacher"]}, random weights, {figures["rows"]:,} rows in sequences of {figures["seq_len"]:,}, batches of
{figures["batch_size"]}, sampler `threshold` with N = {DRAWS}: {figures["entries_per_row"]:.1f} entries and
{figures["bytes_per_row"]:.1f} bytes a row on disk. Both sides in turn on the same batches, median of {figures["repeats"]},
{figures["threads"]} CPU threads.

{table(("side", "rows/s", "over bare"), sides)}

Median over pairs: stage one takes **{overhead:.1%}** more than the bare forward; wanted at most {limit:.0%}:
{"met" if overhead <= limit else "not met"}.
Bare is the body and the float32 head, logits thrown away. Stage one is all of it: sampling, copy, encoding, flushing, commit.

{table(("stage", "seconds", "of the run"), stages)}

Encoding and commit run on the writer's thread beside the others; on a GPU head, sample and copy run beside the next forward, so
that shares may add up to more than all. Most memory: {memory}.
"""


def _prepared(shape: Shape, folder: Path) -> Prepared:
    _write_teacher(shape, folder / "teacher")
    ids = np.random.default_rng(0).integers(1, 250, shape.sequences * shape.seq_len + 1)
    (folder / "ids.jsonl").write_text(json.dumps({"ids": ids.tolist()}) + "\n")
    config = CacheConfig(
        teacher=str(folder / "teacher"), data=str(folder / "ids.jsonl"), ids_column="ids", out=folder / "cache",
        seq_len=shape.seq_len, batch_size=shape.batch_size, draws=DRAWS,
        sequences_per_shard=max(1, shape.sequences // 4),
    )  # fmt: skip
    return prepare(config)


def _write_teacher(shape: Shape, folder: Path) -> None:
    """A Llama of this shape; its head is scaled for a peaked distribution."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings = LlamaConfig(
        **shape.model, max_position_embeddings=shape.seq_len, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0
    )
    large = torch.cuda.is_available()
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if large else torch.float32)
    try:
        with torch.device("cuda" if large else "cpu"):
            model = LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        model.lm_head.weight.mul_(LOGIT_DEVIATION / (model.lm_head.weight.float().std() * settings.hidden_size**0.5))
    model.save_pretrained(folder)
    del model
    if large:
        torch.cuda.empty_cache()
    vocabulary = {f"t{number}": number for number in range(250)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), eos_token="t0"
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
