"""Stage one started the ways users start it, in processes of their own that say what they put through the teacher.

A `sitecustomize` on the path of every Python that a run starts, Ray's included, sends the log of `pipeline.run` to one file: a
line `PID SHARD FIRST SEQUENCES` for each batch that goes to the teacher.
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
from typing import Any, NamedTuple

LOGGING = """
import logging, os
class _Append(logging.Handler):
    def emit(self, record):
        with open(os.environ["BEGUN_LOG"], "a") as file:
            file.write(" ".join(map(str, (os.getpid(), *record.args))) + "\\n")
_logger = logging.getLogger("stillroom.pipeline.run")
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


class Batch(NamedTuple):
    """So many sequences of a shard that went to the teacher, and in which process."""

    pid: int
    shard: int
    first: int
    sequences: int


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
        assert status == 0, self.said()[-3000:]
        return self.said()

    def said(self) -> str:
        """What it printed, all starts together."""
        return (self.log.parent / "out.txt").read_text()

    def begun(self) -> list[Batch]:
        """The batches that went to the teacher, in the order they did."""
        return [Batch(*map(int, line.split())) for line in self.log.read_text().splitlines() if line.count(" ") == 3]


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
    run: Run, cache: Path, shards: int, *, kills: int, every_s: tuple[float, float], together: bool, seed: int
) -> dict[str, float]:
    """SIGKILL a random worker that is at work, every few seconds of work; start the command again where it gives up.

    Args:
        run: the command.
        cache: that it makes.
        shards: of the cache.
        kills: at most.
        every_s: from, to: seconds between a kill, or the first batch of whoever comes after it, and the next.
        together: the engine ends all workers when one dies: only those that come after count as workers at work.
        seed: of the choice.

    Returns:
        `kills` delivered, `starts` of the command, `seconds`, and `sequences` that went to the teacher.
    """
    rng, gone, starts, delivered, start_s = random.Random(seed), set[int](), 1, 0, time.monotonic()
    process, due_s = run.start(), None
    try:
        while True:
            assert time.monotonic() < start_s + 900, run.said()[-3000:]
            time.sleep(0.02)
            if process.poll() is not None:
                if records(cache) == shards and process.returncode == 0:
                    break
                assert starts <= kills + 3, run.said()[-3000:]
                process, starts, due_s = run.start(), starts + 1, None
                continue
            at_work = sorted({batch.pid for batch in run.begun()} - gone)
            if due_s is None and at_work:
                due_s = time.monotonic() + rng.uniform(*every_s)
            if due_s is None or time.monotonic() < due_s or delivered == kills or records(cache) == shards:
                continue
            alive = [pid for pid in at_work if Path(f"/proc/{pid}").exists()]
            due_s = None
            if alive:
                victim = rng.choice(alive)
                os.kill(victim, signal.SIGKILL)
                delivered += 1
                gone |= set(at_work) if together else {victim}
    finally:
        end(process)
    return {
        "kills": delivered,
        "starts": starts,
        "seconds": round(time.monotonic() - start_s, 1),
        "sequences": sum(batch.sequences for batch in run.begun()),
    }
