"""Stage one started the ways users start it, in processes of their own that say when they begin a shard.

A `sitecustomize` on the path of every Python that a run starts, Ray's included, sends the engines' log to one file: a line
`PID SHARD` for each shard begun.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOGGING = """
import logging, os
class _Append(logging.Handler):
    def emit(self, record):
        with open(os.environ["BEGUN_LOG"], "a") as file:
            file.write(f"{os.getpid()} {record.args[0]}\\n")
_logger = logging.getLogger("stillroom.pipeline.engines.here")
_logger.setLevel(logging.DEBUG)
_logger.propagate = False
_logger.addHandler(_Append())
"""
STARTS = {
    "one": ([], []),
    "local": ([], ["--engine", "local", "--workers", "{workers}"]),
    "ray": ([], ["--engine", "ray", "--workers", "{workers}"]),
    "torchrun": (
        ["-m", "torch.distributed.run", "--nproc-per-node", "{workers}", "--max-restarts", "{restarts}",
         "--master-port", "{port}"],
        [],
    ),
}  # fmt: skip


class Run:
    """One command line, started as often as it takes."""

    def __init__(self, engine: str, workers: int, folder: Path, settings: dict[str, Any], restarts: int = 0) -> None:
        self.log = folder / "begun.log"
        site = folder / "site"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(LOGGING)
        self.log.touch()
        words = {"workers": workers, "restarts": restarts, "port": random.SystemRandom().randrange(20000, 60000)}
        before, after = [[word.format(**words) for word in part] for part in STARTS[engine]]
        flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        self.command = [sys.executable, *before, "-m", "stillroom", "cache", *flags, *after]
        root = str(Path(__file__).resolve().parents[2])
        self.environ = {
            **os.environ, "BEGUN_LOG": str(self.log), "PYTHONPATH": os.pathsep.join([str(site), root]),
            "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        """The command in a process group of its own, what it says in `out.txt` beside the log."""
        with (self.log.parent / "out.txt").open("ab") as file:
            return subprocess.Popen(self.command, env=self.environ, stdout=file, stderr=file, start_new_session=True)

    def to_end(self, timeout_s: float = 200) -> str:
        """Run it once, wait, and return what it said."""
        process = self.start()
        try:
            status = process.wait(timeout_s)
        finally:
            end(process)
        said = (self.log.parent / "out.txt").read_text()
        assert status == 0, said[-3000:]
        return said

    def begun(self) -> list[tuple[int, int]]:
        """(process, shard) in the order they were begun."""
        return [(int(line.split()[0]), int(line.split()[1])) for line in self.log.read_text().splitlines()]


def end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a run outlives its test."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def records(cache: Path) -> int:
    """Shards committed."""
    return len(list((cache / "commits").glob("[0-9]*.json")))


def digests(cache: Path) -> dict[str, str]:
    """SHA-256 of every object of every committed shard, by shard and name (names of attempts differ between runs)."""
    import json

    found = {}
    for path in sorted((cache / "commits").glob("[0-9]*.json")):
        record = json.loads(path.read_text())
        for file in sorted((cache / record["path"]).rglob("*")):
            if file.is_file():
                name = f"{path.stem}/{file.relative_to(cache / record['path'])}"
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def kill_at_random(
    run: Run, cache: Path, shards: int, *, kills: int, every_s: tuple[float, float], seed: int
) -> dict[str, int]:
    """SIGKILL a random worker that has begun a shard, again and again; start the command again where it gives up."""
    rng, dead, starts = random.Random(seed), set[int](), 1
    process, until_s = run.start(), time.monotonic() + 900
    try:
        while True:
            assert time.monotonic() < until_s, (run.log.parent / "out.txt").read_text()[-3000:]
            deadline = time.monotonic() + rng.uniform(*every_s)
            while time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.02)
            if process.poll() is not None:
                if records(cache) == shards and process.returncode == 0:
                    break
                assert starts <= kills + 3, (run.log.parent / "out.txt").read_text()[-3000:]
                process, starts = run.start(), starts + 1
                continue
            alive = sorted({pid for pid, _ in run.begun() if pid not in dead and Path(f"/proc/{pid}").exists()})
            if len(dead) < kills and alive and records(cache) < shards:
                victim = rng.choice(alive)
                os.kill(victim, signal.SIGKILL)
                dead.add(victim)
    finally:
        end(process)
    begun = run.begun()
    return {"kills": len(dead), "starts": starts, "begun": len(begun), "wasted": len(begun) - shards}
