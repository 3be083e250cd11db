"""`--engine local`: several workers on this machine, started again when they die.

Each is a process of its own with its share of the cores and, where there are GPUs, one of them. The first packs the corpus
and hands the tokens to the others through a temporary folder of mapped files. They share the shards as any ranks do
(`ranks`), so this process only starts, watches and starts again; it holds no teacher.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.engines.here import sequences_of
from stillroom.pipeline.engines.ranks import Place
from stillroom.pipeline.engines.stop import GRACE_S
from stillroom.pipeline.prepare import Progress
from stillroom.storage.commits import COMMITS, shards_named
from stillroom.storage.depot import Depot, depot_at
from stillroom.storage.errors import CacheError, InputError
from stillroom.storage.manifest import MANIFEST_NAME, Manifest

MODULE: Final = "stillroom.pipeline.engines.worker"
DEATHS_EACH: Final = 3  # deaths a worker, on average, without any new commit: then something is wrong with all
logger = logging.getLogger(__name__)
TICK_S: Final = 0.1
LOOK_EVERY_S: Final = 1.0
LINGER_S: Final = 3.0  # between the last commit and the end, for workers to tell their figures


@dataclass(frozen=True, slots=True)
class LocalRun:
    """What the workers told.

    Attributes:
        before: shards that were committed when the run began.
        stats: the figures of each worker that came to its end.
        restarts: workers started again.
    """

    before: int
    stats: list[dict[str, Any]]
    restarts: int


def run_local(config: CacheConfig, at: Place, on_progress: Progress) -> LocalRun:
    """Make the cache with `config.workers` processes; returns when they have ended.

    Args:
        config: of the run.
        at: of this machine, where several do the same; the workers' ranks follow from it.
        on_progress: told (stage, done, total), `cache` in sequences, from the commit records.

    Raises:
        InputError, PlanMismatchError: a worker's own.
        CacheError: workers die again and again and nothing is committed.
    """
    with tempfile.TemporaryDirectory(prefix="stillroom-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(config.model_dump_json(exclude_unset=True))
        workers = _Workers(config, at, folder, on_progress)
        try:
            return workers.run()
        finally:
            workers.stop()


class _Workers:
    def __init__(self, config: CacheConfig, at: Place, folder: Path, on_progress: Progress) -> None:
        self._config, self._at, self._folder, self._on_progress = config, at, folder, on_progress
        self._gpus = _visible_gpus(config)
        self._count = config.workers or len(self._gpus) or _cores()
        self._threads = config.threads or max(1, _cores() // self._count)
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._unread: dict[int, bytes] = {}
        self._before: int | None = None
        self._stats: list[dict[str, Any]] = []
        self._restarts = self._deaths = self._seen = 0
        self._manifest: Manifest | None = None
        self._complete_s: float | None = None
        self._depot: Depot = depot_at(config.out)

    def run(self) -> LocalRun:
        self._start(0)
        looked_s = time.monotonic()
        while self._running:
            time.sleep(TICK_S)
            for number, process in list(self._running.items()):
                ended = process.poll() is not None  # asked first: what it said before is read below
                for message in self._said(number):
                    self._heard(message)
                if ended:
                    self._ended(number)
            if self._manifest and time.monotonic() - looked_s > LOOK_EVERY_S:
                self._look(self._manifest)
                looked_s = time.monotonic()
            if self._complete_s is not None and time.monotonic() - self._complete_s > LINGER_S:
                break  # who is still starting, or waiting to look again, has nothing to do any more: `stop`
        if self._manifest and self._complete_s is None:
            self._look(self._manifest)
        return LocalRun(self._before or 0, self._stats, self._restarts)

    def stop(self) -> None:
        """End the workers that run: SIGTERM, so that they finish the shard in hand, then SIGKILL."""
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        until_s = time.monotonic() + GRACE_S + 5
        for process in self._running.values():
            try:
                process.wait(max(0.1, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._running.clear()

    def _start(self, number: int) -> None:
        at = Place(self._at.rank * self._count + number, self._at.ranks * self._count)
        environ = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        if self._gpus:
            environ["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        command = [sys.executable, "-m", MODULE, str(self._folder), str(at.rank), str(at.ranks), str(self._threads)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environ)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._running[number], self._unread[number] = process, b""

    def _said(self, number: int) -> list[list[Any]]:
        """Whole lines from a worker since the last call. Its pipe may outlive it, in children of its own: never wait for it."""
        pipe = self._running[number].stdout
        assert pipe is not None
        while data := pipe.read():
            self._unread[number] += data
        *lines, self._unread[number] = self._unread[number].split(b"\n")
        return [json.loads(line) for line in lines]

    def _heard(self, message: list[Any]) -> None:
        kind, *rest = message
        if kind == "progress":
            self._on_progress(*rest)
        elif kind == "stats":
            self._stats.append(rest[0])
        elif kind == "error":
            raise InputError(rest[0])
        elif kind == "prepared":
            if self._before is None:
                self._before = rest[0]
            self._manifest = Manifest.from_json(self._depot.read_json(MANIFEST_NAME))
            self._seen = len(shards_named(self._depot.names(COMMITS)))
            useful = min(self._count, max(1, self._manifest.shards))
            if self._config.workers and useful < self._count:
                logger.warning(
                    "%d workers were asked for and there are %d shards: %d will do", self._count, useful, useful
                )
            for number in range(useful):
                if number not in self._running:
                    self._start(number)

    def _ended(self, number: int) -> None:
        process = self._running.pop(number)
        assert process.stdout is not None
        process.stdout.close()
        if (status := process.wait()) == 0:
            return
        self._deaths += 1
        raised_at_once = status > 0 and self._manifest is None  # it would again
        if self._deaths > DEATHS_EACH * self._count or raised_at_once:
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise CacheError(
                f"workers ended without a new shard ({self._deaths}, the last by {how}): see the messages above, and if memory "
                "is short, take fewer --workers"
            )
        self._restarts += 1
        self._start(number)

    def _look(self, manifest: Manifest) -> None:
        done = shards_named(self._depot.names(COMMITS))
        if len(done) > self._seen:
            self._seen, self._deaths = len(done), 0
            self._on_progress("cache", sequences_of(manifest, done), manifest.sequences)
        if self._complete_s is None and len(done) >= manifest.shards:
            self._complete_s = time.monotonic()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus(config: CacheConfig) -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES; counted without a context, which would take memory on each."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
