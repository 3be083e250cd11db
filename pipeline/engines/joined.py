"""`--tensor-parallel N` under torchrun: every N processes are one worker, put together and ended together.

Each group is a `torch.distributed` world of its own, so that groups need each other no more than single workers do, and the
hub library, which wants the world for one model, has it. The first process of a group leads (`pipeline.group`); the others never
come back from `joined`: they follow, print nothing, and leave with the leader's status.

An error in one process finds the others inside a collective call that will not end. So a thread in each looks at the store
that the leader keeps: there a follower says what went wrong, and the leader that it is over.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Final, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch's own way to name them
from torch.distributed.rendezvous import rendezvous

from stillroom.pipeline.config import CacheConfig
from stillroom.pipeline.engines.ranks import Place
from stillroom.pipeline.group import Group
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.errors import CacheError, InputError, StillroomError

TORCHRUN: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COLLECTIVE: Final = timedelta(hours=2)  # of loading and batches, where all are at the same step
LOOK_EVERY_S: Final = 0.2
GRACE_S: Final = 5.0  # for the leader to meet the same error itself, and for the others to hear of it


def check_engine(config: CacheConfig) -> None:
    """Refuse settings that do not go with `--tensor-parallel`.

    Raises:
        InputError: naming them.
    """
    if config.tensor_parallel == 1:
        return
    if config.engine != "ranks":
        raise InputError(
            f"--tensor-parallel came with --engine {config.engine}, whose workers are one process each: start the command with "
            "torchrun and leave --engine out, or use --device-map auto"
        )
    if config.device_map is not None:
        raise InputError(
            "--tensor-parallel and --device-map both came, and each says where the teacher's layers go: drop one"
        )
    if config.device == "cpu" and torch.cuda.is_available():
        raise InputError(
            "--tensor-parallel came with --device cpu where there are GPUs, which transformers would take: hide them with "
            "CUDA_VISIBLE_DEVICES="
        )


@contextmanager
def joined(
    config: CacheConfig, at: Place, environ: Mapping[str, str] | None = None
) -> Iterator[tuple[Place, Group | None]]:
    """The place of this worker and the processes it is made of; without `--tensor-parallel`, `at` and None.

    Yields in the leader only. The other processes load the teacher, follow, and leave: with SystemExit at the end, else at once.

    Args:
        config: of the run.
        at: place of this process, or with `--rank` of this torchrun among others.
        environ: variables; the process's own by default.

    Raises:
        InputError: processes that are no groups of that size, or what went wrong in one of the others.
        CacheError: one of them is gone.
    """
    size = config.tensor_parallel
    if size == 1:
        yield at, None
        return
    told = os.environ if environ is None else environ
    rank, at = seat(config, at, told)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(told["LOCAL_RANK"]))
    watch = _meet(rank, size, told)
    group = Group()
    if group.rank:
        _follow(config, group, watch)
    try:
        yield at, group
        group.dismiss()
    except BaseException as error:
        _KEPT.append(watch)  # its store ends with this process, and that is what the others wait for
        sentence = watch.ending(_status(error))
        if isinstance(error, RuntimeError) and not isinstance(error, StillroomError) and (sentence or _is_loss(error)):
            raise CacheError(sentence or _LOST.format(str(error).splitlines()[0])) from error
        raise
    watch.part()
    dist.destroy_process_group()


def seat(config: CacheConfig, at: Place, told: Mapping[str, str]) -> tuple[int, Place]:
    """Rank of this process within its group, and the group's place among all workers.

    Raises:
        InputError: not under torchrun, or numbers that do not fit.
    """
    size = config.tensor_parallel
    missing = [name for name in TORCHRUN if name not in told]
    if missing:
        raise InputError(
            f"--tensor-parallel came as {size} and {missing[0]} is not set: start the command with torchrun, as in "
            f"torchrun --nproc-per-node {size} -m stillroom cache ..."
        )
    rank, world, _, here = (int(told[name]) for name in TORCHRUN[:4])
    if world % size:
        raise InputError(
            f"--tensor-parallel came as {size} and torchrun started {world} processes, wanted a multiple of {size}: change "
            "--nproc-per-node or --tensor-parallel"
        )
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise InputError(
            f"torchrun started {here} processes on a machine with {torch.cuda.device_count()} GPUs, and with --tensor-parallel "
            "each needs one of its own: lower --nproc-per-node"
        )
    outer = at if config.rank is not None else Place(0, 1)
    groups = world // size
    return rank % size, Place(outer.rank * groups + rank // size, outer.ranks * groups, at.told_by)


class _Watch:
    """A thread that looks into the leader's store, and ends this process where its main thread can not.

    Args:
        store: a connection of its own.
        rank, size: of the group.
        server: the store itself, in the leader.
    """

    def __init__(self, store: Store, rank: int, size: int, server: Store | None) -> None:
        self._store, self._rank, self._size, self._server = store, rank, size, server
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow if rank else self._lead, daemon=True)
        self._thread.start()

    def part(self) -> None:
        """The end, without an error: the leader waits for the others, who will miss it no more."""
        self._close()
        self._store.add("heard", 1)
        if self._rank == 0:
            self._wait_heard(self._size)

    def ending(self, status: int) -> str | None:
        """The leader ends with an error: tell the others their status. Returns what one of them said before."""
        self._close()
        self._tell(status)
        return self._store.get("failed").decode() if self._store.check(["failed"]) else None

    def fail(self, sentence: str) -> NoReturn:
        """In a follower: have the leader say `sentence`, and end with it."""
        try:
            self._store.set("failed", sentence)
        except RuntimeError:  # it is gone
            os._exit(1)
        self._thread.join()
        raise AssertionError("the thread ends with its process")

    def _close(self) -> None:
        self._done.set()
        self._thread.join()  # a thread that is inside the store when the interpreter ends brings it down

    def _tell(self, status: int) -> None:
        self._store.set("over", str(status))
        self._wait_heard(self._size - 1)

    def _wait_heard(self, count: int) -> None:
        until_s = time.monotonic() + GRACE_S
        while self._store.add("heard", 0) < count and time.monotonic() < until_s:
            time.sleep(LOOK_EVERY_S / 10)

    def _lead(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            if self._store.check(["failed"]) and not self._done.wait(GRACE_S):
                print(f"stillroom: {self._store.get('failed').decode()}", file=sys.stderr, flush=True)
                self._tell(2)
                os._exit(2)

    def _follow(self) -> None:
        status: int | None = None
        while not self._done.wait(LOOK_EVERY_S):
            try:
                if self._store.check(["over"]) and status is None:
                    status = int(self._store.get("over"))
                    self._store.add("heard", 1)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where torch would tell of the end of the store
            except RuntimeError:  # the leader's process has ended, and said what there was to say
                if not self._done.is_set():
                    os._exit(1 if status is None else status)


_KEPT: Final[list[_Watch]] = []
_CALLS: Final = count()
_LOST: Final = (
    "a process of this tensor-parallel group is gone ({}): run the same command again, what was committed is kept"
)


def _meet(rank: int, size: int, told: Mapping[str, str]) -> _Watch:
    """Make the group this process's world. The leader keeps its store, and says through torchrun's where that is."""
    everybody, world_rank, _ = next(rendezvous("env://"))
    key = f"stillroom/{told.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_CALLS)}/{world_rank // size}"
    server: Store | None = None
    if rank == 0:
        one_machine = int(told["LOCAL_RANK"]) + size <= int(told["LOCAL_WORLD_SIZE"])
        host = "localhost" if one_machine else socket.getfqdn()
        server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        everybody.set(key, f"{host} {server.port}")
    host, port = everybody.get(key).decode().split()
    mine, watched = (TCPStore(host, int(port), is_master=False, wait_for_workers=False) for _ in range(2))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("world", mine), rank=rank, world_size=size, timeout=COLLECTIVE)
    return _Watch(PrefixStore("watch", watched), rank, size, server)


def _follow(config: CacheConfig, group: Group, watch: _Watch) -> NoReturn:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # the leader decides when it is over
            signal.signal(number, signal.SIG_IGN)
    try:
        group.follow(Teacher(config, group))
    except StillroomError as error:
        watch.fail(str(error))
    except BaseException as error:
        if not _is_loss(error):
            traceback.print_exc()
        watch.fail(f"process {group.rank} of a tensor-parallel group ended with {type(error).__name__}: {error}")
    watch.part()
    dist.destroy_process_group()
    raise SystemExit(0)


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return int(getattr(error, "status", 130))
    return 2 if isinstance(error, StillroomError | OSError) else 1


def _is_loss(error: BaseException) -> bool:
    """Whether it is what a collective call says when a peer has gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
