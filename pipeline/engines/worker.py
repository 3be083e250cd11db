"""One worker of `--engine local`, a process of its own: `python -m stillroom.pipeline.engines.worker FOLDER RANK RANKS THREADS`.

FOLDER holds config.json, and the settled run once a worker has packed the corpus. Tells its parent, a JSON list a line on
standard output: ["progress", stage, done, total], ["prepared", shards committed before], ["stats", ...], ["error", sentence].
Exit status: 0 done, 2 an error that another try would meet again, 143 SIGTERM; anything else is worth another try.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.engines.handover import is_saved, load, save
from stillroom.pipeline.engines.here import run_place
from stillroom.pipeline.engines.ranks import Place
from stillroom.pipeline.engines.stop import STATUS, Stop, Terminated
from stillroom.pipeline.prepare import Prepared, prepare
from stillroom.storage.errors import InputError, PlanMismatchError

EVERY_S: Final = 0.5
FINAL_ERRORS: Final = (InputError, PlanMismatchError)

Tell = Callable[..., None]


def main(arguments: list[str]) -> int:
    """Work until the cache is whole; returns the exit status."""
    folder, at = Path(arguments[0]), Place(int(arguments[1]), int(arguments[2]))
    torch.set_num_threads(int(arguments[3]))
    tell = _channel()
    try:
        parent = os.getppid()
        with Stop(unless=lambda: os.getppid() != parent) as stop:
            prepared = _prepared(folder, tell)
            stats, _ = run_place(prepared, at, stop, lambda stage, done, total: None)
            tell("stats", dataclasses.asdict(stats))
        return 0
    except FINAL_ERRORS as error:
        tell("error", str(error))
        return 2
    except (Terminated, BrokenPipeError):  # the latter: the parent is gone
        return STATUS
    except KeyboardInterrupt:
        return 130


def _prepared(folder: Path, tell: Tell) -> Prepared:
    if is_saved(folder):
        return load(folder)
    told_s = 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s > EVERY_S:
            told_s = time.monotonic()
            tell("progress", stage, done, total)

    prepared = prepare(CacheConfig(**json.loads((folder / "config.json").read_text())), progress)
    before = len(prepared.writer().committed())
    save(prepared, folder)
    tell("prepared", before)
    return prepared


def _channel() -> Tell:
    """A function that sends a line to the parent; what libraries print goes to standard error instead."""
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(*message: Any) -> None:
        pipe.write(json.dumps(message) + "\n")

    return tell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
