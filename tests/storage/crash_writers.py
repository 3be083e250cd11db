"""Four writers on one directory, killed at random and started again until the cache is whole.

    python crash_writers.py ROOT --kills 50 --seed 0 --shards 120 --sequences 2 --seq-len 16

Writers are real processes (forked, so that a new one starts in milliseconds), the kills are SIGKILL. A kill waits for a
random moment after a writer has said that it began a shard. What a writer does goes line by line to ROOT.log; what the
supervisor saw is printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import made

from stillroom.storage.spec import SamplerSpec
from stillroom.storage.writer import CacheWriter

WRITERS = 4


def plan(shards: int, sequences: int, seq_len: int):
    """The manifest of the cache that is being written."""
    return made.manifest(
        SamplerSpec(draws=20),
        vocab_size=500,
        seq_len=seq_len,
        sequences=shards * sequences - 1,
        sequences_per_shard=sequences,
    )


def write(root: Path, manifest, seed: int, log: int) -> None:
    """One writer: the shards in an order of its own, those that are there left out, until none is missing."""
    writer = CacheWriter(root, manifest)
    order = random.Random(seed)
    while missing := sorted(set(range(manifest.shards)) - writer.committed()):
        index = missing[order.randrange(len(missing))]
        data = made.shard_data(manifest, index)
        os.write(log, f"start {os.getpid()} {index}\n".encode())
        record = writer.write_shard(index, *data)
        os.write(log, f"done {os.getpid()} {index} {record.path}\n".encode())


def start(root: Path, manifest, seed: int, log: int) -> int:
    """A new writer process; its id."""
    process = os.fork()
    if not process:
        status = 1
        try:
            write(root, manifest, seed, log)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return process


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def main() -> None:
    """Run writers and kills; print what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    for name, value in {"kills": 50, "seed": 0, "shards": 120, "sequences": 2, "seq-len": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    root, rng = arguments.root, random.Random(arguments.seed)
    manifest = plan(arguments.shards, arguments.sequences, arguments.seq_len)
    log_path = root.with_name(root.name + ".log")
    log = os.open(log_path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    running = {start(root, manifest, rng.getrandbits(32), log) for _ in range(WRITERS)}
    killed, seen, changed, failed = 0, {}, 0, 0
    while running:
        if killed < arguments.kills:
            begun = len(lines(log_path))
            for _ in range(2000):  # until somebody begins or ends a shard
                if len(lines(log_path)) != begun:
                    break
                time.sleep(0.0005)
            time.sleep(rng.choice([0.0, rng.uniform(0, 0.004), rng.uniform(0, 0.03)]))
            victim = rng.choice(sorted(running))
            os.kill(victim, signal.SIGKILL)
        process, status = os.wait()
        running.discard(process)
        if os.WIFSIGNALED(status):
            killed += 1
            running.add(start(root, manifest, rng.getrandbits(32), log))
        elif os.WEXITSTATUS(status):
            failed += 1
        # A record that was seen once must never be another.
        for path in (root / "commits").glob("[0-9]*.json"):
            changed += seen.setdefault(path.name, path.read_bytes()) != path.read_bytes()
    os.close(log)

    done = [line for line in lines(log_path) if line[0] == "done"]
    named = {json.loads(data)["path"] for data in seen.values()}
    attempts = {f"shards/{path.name}" for path in (root / "shards").iterdir()}
    print(json.dumps({
        "kills": killed,
        "failed writers": failed,
        "records": len(seen),
        "records changed": changed,
        "shards begun": sum(line[0] == "start" for line in lines(log_path)),
        "lost races": len(done) - len({line[2] for line in done}),
        "orphan attempts": len(attempts - named),
        "temporary files": len(list(root.rglob("*.tmp"))),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
