"""What stands between the bytes of a cache and a training loop: opening thousands of shards, and a loader's workers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from benchmarks.report import interleaved
from stillroom.storage import strict
from stillroom.storage.cache import open_cache
from stillroom.storage.commits import load_record, record_name
from stillroom.storage.index import INDEX_NAME, index_bytes
from stillroom.storage.manifest import Manifest
from stillroom.train import batch as transport
from stillroom.train.data import CacheDataset, as_is

BATCH = 16  # sequences
SHARDS = 12_000
OPEN = """
import json, pathlib, sys, time
start, cpu = time.perf_counter(), time.process_time()
from stillroom.storage.cache import open_cache
cache = open_cache(sys.argv[1], **json.loads(sys.argv[2]))
assert cache.record(11_999).shard == 11_999 and len(cache.shards) == 12_000
print(json.dumps({"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu,
                  "megabytes": int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024}))
"""


def opening(made: Path, folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Open a cache of 12,000 synthetic records, imports included, in processes of their own: medians.

    Args:
        made: a cache of one shard, whose record the others are like.
        folder: new directory.
        repeats: processes each way.
    """
    one, source = load_record(made, Manifest.load(made), 0), Manifest.load(made)
    per_shard = source.sequences
    manifest = replace(source, sequences=SHARDS * per_shard, sequences_per_shard=per_shard)
    records = [
        replace(
            one,
            manifest=manifest.identity,
            shard=index,
            path=f"shards/{index:06d}-0123456789abcdef.zarr",
            start=index * per_shard,
            stop=(index + 1) * per_shard,
        )
        for index in range(SHARDS)
    ]
    (folder / "commits").mkdir(parents=True)
    (folder / "manifest.json").write_text(strict.dumps(manifest.to_json()))
    for record in records:
        (folder / record_name(record.shard)).write_text(strict.dumps(record.to_json()))
    (folder / INDEX_NAME).write_bytes(index_bytes(manifest, records))
    ways = {
        "a directory": [str(folder), "{}"],
        "a URL, through index.arrow": [f"file://{folder}", json.dumps({"cache_dir": str(folder.parent / "local")})],
    }
    figures = {}
    for name, arguments in ways.items():
        command = [sys.executable, "-c", OPEN, *arguments]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(repeats)
        ]
        figures[name] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
    return figures


def loader(root: Path, order: np.ndarray, repeats: int) -> dict[str, float]:
    """A `DataLoader` that feeds collated CSR batches: where its time goes, and how many rows a second come out."""
    dataset = CacheDataset(open_cache(root, columns=("tokens",)))
    groups = [[int(i) for i in order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    batches = [dataset.__getitems__(group) for group in groups]
    rows = len(order) * dataset.seq_len
    seconds = interleaved(
        {
            "read": lambda: [dataset.cache.read(group) for group in groups],
            "read and collate": lambda: [dataset.__getitems__(group) for group in groups],
            "copy into shared memory": lambda: [transport._reduce(batch) for batch in batches],
        },
        repeats,
        time.process_time,
    )
    figures: dict[str, float] = {
        "read, ns a row": 1e9 * seconds["read"] / rows,
        "collate, ns a row": 1e9 * (seconds["read and collate"] - seconds["read"]) / rows,
        "copy into shared memory, ns a row": 1e9 * seconds["copy into shared memory"] / rows,
    }
    for workers in (0, 1, 2):
        runs = [_run(dataset, order, workers) for _ in range(repeats)]
        figures[f"rows_per_s, {workers} workers"] = float(np.median([rate for rate, _ in runs]))
        figures[f"main process busy, {workers} workers"] = float(np.median([busy for _, busy in runs]))
    return figures


def _run(dataset: CacheDataset, order: np.ndarray, workers: int) -> tuple[float, float]:
    passes = [int(index) for _ in range(-(-512 // len(order))) for index in order]
    feed: Any = DataLoader(dataset, batch_size=BATCH, sampler=passes, num_workers=workers, collate_fn=as_is)  # type: ignore[arg-type]
    rows, start, cpu = 0, 0.0, 0.0
    for number, batch in enumerate(feed):
        if number == 3:  # the workers have started
            start, cpu = time.perf_counter(), time.process_time()
        elif number > 3:
            rows += batch.labels_BL.numel()
    took_s = time.perf_counter() - start
    return rows / took_s, (time.process_time() - cpu) / took_s
