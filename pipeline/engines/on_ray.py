"""`--engine ray`: one Ray task per shard, retried by Ray where a worker or a node goes; Ray scales and places.

Tasks and not actors: a task in the queue is what Ray's autoscaler counts, any node that fits may take it, and a lost one is
simply run again. The teacher stays in the worker process from task to task. The corpus is packed in one task; its tokens
are an object that every node maps.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.prepare import Prepared, Progress, prepare
from stillroom.pipeline.run import RunStats, run_shards
from stillroom.storage.commits import COMMITS, shards_named
from stillroom.storage.depot import depot_at
from stillroom.storage.errors import CacheError, InputError, StillroomError
from stillroom.storage.manifest import MANIFEST_NAME, Manifest

RETRIES: Final = 20  # of one shard: preemptions, kills, errors that may pass
QUEUED: Final = 1000  # tasks waiting at a time where --workers does not say: what an autoscaler sees
PASSING: Final = [OSError, RuntimeError, CacheError]  # errors worth another try

logger = logging.getLogger(__name__)
_kept: dict[str, Prepared] = {}  # of a worker process: the run it works for, with its teacher


def run_ray(config: CacheConfig, on_progress: Progress) -> tuple[int, list[RunStats]]:
    """Make the cache on a Ray cluster: the one RAY_ADDRESS or `ray start` leads to, else one on this machine.

    Args:
        config: of the run; `workers` is the most tasks at a time, `threads` the CPUs of each.
        on_progress: told (`cache`, sequences, total).

    Returns:
        Shards committed before, and the figures of each task.

    Raises:
        InputError: Ray is not installed; a task's own.
        CacheError: a shard failed `RETRIES` times.
    """
    ray = _ray()
    owned = not ray.is_initialized()
    if owned:
        _init(ray, config)
    try:
        return _run(ray, config, on_progress)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StillroomError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CacheError(f"Ray gave up ({reason}): run the same command again, what was committed is kept") from error
    finally:
        if owned:
            ray.shutdown()


def _run(ray: Any, config: CacheConfig, on_progress: Progress) -> tuple[int, list[RunStats]]:
    gpus = 0 if config.device == "cpu" else 1 if config.device == "cuda" or ray.cluster_resources().get("GPU") else 0
    options = {
        "num_cpus": config.threads or 1,
        "num_gpus": gpus,
        "max_retries": RETRIES,
        "retry_exceptions": PASSING,
        "max_calls": 0,  # else a worker with a GPU ends after each task, and loads the teacher for every shard
    }
    prepared = ray.remote(**options)(_prepare).remote(config)
    ray.get(ray.remote(num_cpus=0)(_nothing).remote(prepared))  # its errors, without the tokens
    depot = depot_at(config.out)
    manifest = Manifest.from_json(depot.read_json(MANIFEST_NAME))
    before = shards_named(depot.names(COMMITS))
    todo = [shard for shard in reversed(range(manifest.shards)) if shard not in before]
    window = min(config.workers or QUEUED, len(todo))
    if config.workers and len(todo) < config.workers:
        logger.warning("%d workers were asked for and %d shards are left: %d will do", config.workers, window, window)
    task = ray.remote(**options)(_make)
    sizes = [stop - start for start, stop in map(manifest.shard_range, range(manifest.shards))]
    done, running, stats = sum(sizes[shard] for shard in before), dict[Any, int](), list[RunStats]()
    while todo or running:
        while todo and len(running) < window:
            shard = todo.pop()
            running[task.remote(prepared, shard)] = shard
        for reference in ray.wait(list(running), num_returns=1)[0]:
            stats.append(ray.get(reference))
            done += sizes[running.pop(reference)]
            on_progress("cache", done, manifest.sequences)
    return len(before), stats


def _prepare(config: CacheConfig) -> Prepared:
    return prepare(config)


def _nothing(prepared: Prepared) -> None:
    del prepared


def _make(prepared: Prepared, shard: int) -> RunStats:
    """One shard, in a worker of Ray."""
    run = f"{prepared.config.out} {prepared.manifest.identity}"
    if run not in _kept:
        _kept.clear()
        _kept[run] = prepared
    return run_shards(_kept[run], [shard])


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--engine ray needs Ray, which is not installed: pip install 'stillroom[ray]', or use --engine local"
        ) from error
    return ray


def _init(ray: Any, config: CacheConfig) -> None:
    settings = {"logging_level": logging.WARNING, "configure_logging": True}
    if "RAY_ADDRESS" not in os.environ:
        try:
            ray.init(address="auto", **settings)
            return
        except ConnectionError:  # no cluster here: one for this run
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cores = len(os.sched_getaffinity(0))
            wanted = (config.workers or 0) * (config.threads or 1)
            ray.init(num_cpus=max(cores, wanted), include_dashboard=False, **settings)
            return
    ray.init(**settings)
