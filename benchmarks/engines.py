"""Rows per second of stage one by number of processes, each with one thread: `python -m benchmarks.engines`.

A round prepares the run once and then starts 1, 2, ... processes on fresh caches, all with the tokens and a loaded teacher
before the clock starts, so that what is measured is the work over shards: forward, head, sampler, encoding, commit. The
time is from the common start to the last commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import figures_of, render, save, table

TITLE = "Engines: stage one in several processes of one machine"
WANTED = 1.6  # two processes against one, on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="counts to compare (default 1 2)")
    parser.add_argument("--sequences", type=int, default=192, help="sequences of 256 rows a run (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, median kept (default %(default)s)")
    parser.add_argument("--render", action="store_true", help="only make the page again from the kept JSON")
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "RANK", "RANKS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(Path(arguments.worker[0]), int(arguments.worker[1]), int(arguments.worker[2]))
    if not arguments.render:
        with tempfile.TemporaryDirectory() as name:
            figures = measure(Path(name), arguments.processes, arguments.sequences, arguments.repeats)
        save("engines", TITLE, "python -m benchmarks.engines", figures, page(figures))
        return None
    return render("engines", TITLE, page(figures_of("engines")))


def measure(folder: Path, counts: list[int], sequences: int, repeats: int) -> dict[str, Any]:
    """Rows per second by process count, counts in turn in every round so that drift hits all alike."""
    make_inputs(folder, sequences)
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for repeat in range(repeats):
        for count in counts:
            rates[count].append(rate(folder, count, folder / f"{repeat}-{count}", sequences))
            print(f"round {repeat + 1}: {count} processes, {rates[count][-1]:,.0f} rows/s", file=sys.stderr, flush=True)
    return {
        "rows": sequences * 256,
        "repeats": repeats,
        "load": os.getloadavg()[0],
        "rows_per_s": {str(count): round(median(values), 1) for count, values in rates.items()},
        "all": {str(count): [round(value, 1) for value in values] for count, values in rates.items()},
        # Rounds compared with themselves: a machine that slows down for a minute does so for both.
        "gain": {str(c): round(median(a / b for a, b in zip(rates[c], rates[counts[0]])), 3) for c in counts},
    }


def rate(folder: Path, count: int, out: Path, sequences: int) -> float:
    """Rows per second of `count` processes from their common start to the last commit."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "BENCHMARK_OUT": str(out)}
    command = [sys.executable, "-m", "benchmarks.engines", "--worker", str(folder)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(count)], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    for worker in workers:
        ask(worker, None)  # ready
    start_s = time.time()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    ends_s = [ask(worker, "end") for worker in workers]
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0
    return sequences * 256 / (max(ends_s) - start_s)


def ask(worker: subprocess.Popen[str], key: str | None) -> float:
    """The worker's next line."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended early with status {worker.wait()}")
    said: dict[str, float] = json.loads(line)
    return said[key] if key else 0.0


def work(folder: Path, rank: int, ranks: int) -> None:
    """One process: make ready, say so, wait for the word, make its shards, say when the last was committed."""
    from dataclasses import replace

    import torch

    from stillroom.pipeline.engines.ranks import Deal, Place
    from stillroom.pipeline.prepare import prepare
    from stillroom.pipeline.run import run_shards

    torch.set_num_threads(1)
    config = settings(folder)
    prepared = prepare(config)
    prepared = replace(prepared, config=config.model_copy(update={"out": Path(os.environ["BENCHMARK_OUT"])}))
    committed = prepared.writer().committed
    prepared.teacher()
    print("{}", flush=True)
    sys.stdin.readline()
    run_shards(prepared, Deal(prepared.manifest.shards, Place(rank, ranks), committed))
    print(json.dumps({"end": time.time()}), flush=True)


def settings(folder: Path) -> Any:
    """Those of a run; its own `out` only holds the manifest."""
    from stillroom.pipeline.config import CacheConfig

    return CacheConfig(
        teacher=str(folder / "teacher"), data=str(folder / "corpus.jsonl"), ids_column="ids", out=folder / "plan",
        seq_len=256, sequences_per_shard=8, batch_size=8, dtype="float32", device="cpu", threads=1,
    )  # fmt: skip


def make_inputs(folder: Path, sequences: int) -> None:
    """A random Llama of the demo's size with its tokenizer, and a corpus of random ids."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab_size = 4096
    words = {"<eos>": 0} | {f"w{number}": number for number in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.1,
            architectures=["LlamaForCausalLM"],
        )
    ).save_pretrained(folder / "teacher")
    rng = np.random.default_rng(0)
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"ids": rng.integers(1, vocab_size, 255).tolist()}) + "\n" for _ in range(sequences + 1)
        )


def page(figures: dict[str, Any]) -> str:
    """The page's body."""
    rates, gain = figures["rows_per_s"], figures["gain"]
    body = table(
        ("processes, one thread each", "rows/s", "gain over one"),
        [(count, f"{rates[count]:,.0f}", f"{gain[count]:.2f}") for count in rates],
    )
    wanted = f"Two processes: {gain['2']:.2f} times one, {WANTED} wanted." if "2" in gain else ""
    return (
        f"{figures['rows']:,} rows of a random Llama (6 layers of 256, 4,096 ids) at sequence length 256 on a CPU in float32, "
        f"{figures['repeats']} rounds, median; shards of 8 sequences, from the common start to the last commit, packing and "
        f"loading left out. The machine's load (other work included) was {figures['load']:.1f}.\n\n{body}\n\n{wanted}"
    )


if __name__ == "__main__":
    main()
