"""Batches of tokens in, sparse targets on the host out: teacher's body, head, sampler, copy.

On CUDA the body of the next batch is queued before the head, sampler and copy of this one, which run beside it on a stream of
their own: the GPU goes from forward to forward, and the one wait of the sampler is hidden. On a CPU there is nothing to overlap
with and each batch goes straight through. Nor is there overlap where several processes hold the teacher together: their
exchanges must come in one order.

Shapes: `B` sequences of a batch, `L` rows per sequence, `N` rows in work, `X` width of what the head reads, `V` vocabulary, `C`
columns of it that this process has logits of.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stillroom.kernels import targets as torch_targets
from stillroom.kernels.sample import sample, sample_sharded
from stillroom.pipeline.host import spread, to_host
from stillroom.pipeline.pieces import LOGITS_BYTES, Piece, piece_rows, pieces_of
from stillroom.pipeline.stage_clock import StageClock
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.errors import InputError
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets

log = logging.getLogger("stillroom")


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that follow each other.

    Attributes:
        first: index in the corpus of the first: part of the generator's key.
        tokens_BL1: `[B, L+1]` token ids.
        positions_BL: `[B, L]` positions that start again at every document, or None where there are no documents to tell apart.
        keep_BL: `[B, L]` rows that keep a target, or None where all do.
    """

    first: int
    tokens_BL1: npt.NDArray[np.uint32]
    positions_BL: npt.NDArray[np.int64] | None = None
    keep_BL: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.tokens_BL1)

    def split(self, size: int) -> list[Batch]:
        """The same sequences in batches of at most `size`."""
        return [
            Batch(
                self.first + begin,
                self.tokens_BL1[begin : begin + size],
                None if self.positions_BL is None else self.positions_BL[begin : begin + size],
                None if self.keep_BL is None else self.keep_BL[begin : begin + size],
            )
            for begin in range(0, len(self), size)
        ]


@dataclass(frozen=True, slots=True)
class _Flight:
    """A batch whose body is queued; `ready` has passed when `states_BLX` are there."""

    batch: Batch
    states_BLX: torch.Tensor
    ready: torch.cuda.Event | None


class Sampling:
    """The stages between tokens and targets.

    A target depends on its sequence alone: pieces of logits have one shape whatever the batch, and the sampler's rows do not
    depend on each other. The batch must be of one size too (short ones are padded); where a library's matrix products change
    with that size, and 16-bit ones on a GPU do, so do the last bits of the logits.

    Args:
        teacher: who speaks.
        spec: how its distribution is thinned.
        batch_size: sequences of a forward.
        skip_bad_rows: rows that no sampler can use keep nothing and are counted, instead of ending the run.
        clock: told where the time goes.

    Attributes:
        batch_size: halved, once, if the device runs out of memory.
        bad_rows: rows that were left out so far.
        notes: what the user should know.
    """

    def __init__(
        self,
        teacher: Teacher,
        spec: SamplerSpec,
        *,
        batch_size: int,
        skip_bad_rows: bool = False,
        clock: StageClock | None = None,
    ) -> None:
        self._teacher, self._spec, self._skip = teacher, spec, skip_bad_rows
        self._clock = clock or StageClock(teacher.device)
        self._ahead = 1 if teacher.device.type == "cuda" and teacher.group is None else 0
        self._side: torch.cuda.Stream | None = None
        self._logits_NC: torch.Tensor | None = None
        self.batch_size, self.bad_rows = batch_size, 0
        self.notes: list[str] = []

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, SparseTargets]]:
        """Targets of every batch, exact (not yet coded), in order; a batch may come back in parts.

        Raises:
            InputError: logits that no sampler can use, naming sequence and row; too little memory.
        """
        if self._teacher.group is not None:
            batches = list(batches)
            self._teacher.together(_follow, self._spec, batches, batch_size=self.batch_size, skip_bad_rows=self._skip)
        source, todo, flying = iter(batches), deque[Batch](), deque[_Flight]()
        while True:
            if not todo:
                todo.extend(part for batch in islice(source, 1) for part in batch.split(self.batch_size))
            if not todo and not flying:
                return
            try:
                if todo:
                    flying.append(self._launch(todo[0]))
                    todo.popleft()
                    if len(flying) <= self._ahead:
                        continue
                targets = self._land(flying[0])
            except torch.OutOfMemoryError as error:
                self._halve(error)
                again = [flight.batch for flight in flying] + list(todo)
                todo = deque(part for batch in again for part in batch.split(self.batch_size))
                flying.clear()
                self._logits_NC = None
                continue
            yield flying.popleft().batch, targets

    @torch.inference_mode()
    def _launch(self, batch: Batch) -> _Flight:
        inputs = [batch.tokens_BL1[:, :-1], batch.positions_BL]
        # A shorter batch is filled up with its first sequence, for the shape.
        rows_B = np.arange(self.batch_size)
        rows_B[len(batch) :] = 0
        on_host = [None if array is None else torch.from_numpy(array[rows_B].astype(np.int64)) for array in inputs]
        if self._teacher.device.type == "cuda":
            on_host = [None if tensor is None else tensor.pin_memory() for tensor in on_host]
        with self._clock.stage("forward"):
            states_BLX = self._teacher.body(*on_host)  # type: ignore[arg-type]  # tokens are never None
        ready = None
        if states_BLX.is_cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(states_BLX.device))
        return _Flight(batch, states_BLX, ready)

    @torch.inference_mode()
    def _land(self, flight: _Flight) -> SparseTargets:
        states_BLX = flight.states_BLX
        length, device = states_BLX.shape[1], states_BLX.device
        parts = []
        with self._beside(flight):
            room = self._room(length, device)
            pieces = pieces_of(len(flight.batch), length, self._teacher.vocab_size, device)
            while pieces:
                group = [pieces.popleft()]
                rows = group[0].stop - group[0].start
                while pieces and rows + pieces[0].stop - pieces[0].start <= len(room):
                    group.append(pieces.popleft())
                    rows += group[-1].stop - group[-1].start
                parts.append(self._sampled(flight, group, room[:rows]))
        return parts[0] if len(parts) == 1 else SparseTargets.concat(parts)

    def _sampled(self, flight: _Flight, group: list[Piece], logits_NC: torch.Tensor) -> SparseTargets:
        batch, device, end = flight.batch, logits_NC.device, 0
        with self._clock.stage("head", device):
            for piece in group:
                start, end = end, end + piece.stop - piece.start
                self._teacher.head(flight.states_BLX[piece.index, piece.start : piece.stop], out=logits_NC[start:end])
        row_N = np.concatenate([np.arange(piece.start, piece.stop) for piece in group])
        index_N = np.concatenate([np.full(piece.stop - piece.start, piece.index) for piece in group])
        labels_N = batch.tokens_BL1[index_N, row_N + 1].astype(np.int64)
        keep_N = np.ones(len(row_N), np.bool_) if batch.keep_BL is None else batch.keep_BL[index_N, row_N]
        keys_3N = np.stack((labels_N, batch.first + index_N, row_N))
        with self._clock.stage("sample", device):
            targets = self._drawn(logits_NC, keys_3N, keep_N)
        with self._clock.stage("copy", device):
            return to_host(targets)

    def _drawn(
        self, logits_NC: torch.Tensor, keys_3N: npt.NDArray[np.int64], keep_N: npt.NDArray[np.bool_]
    ) -> torch_targets.SparseTargets:
        try:
            return self._draw(logits_NC, keys_3N, keep_N)
        except ValueError as error:
            bad_N = keep_N & ~torch.isfinite(self._teacher.tops(logits_NC)).cpu().numpy()
            if not bad_N.any():
                raise InputError(f"teacher {self._teacher.name} can not be sampled: {error}") from error
            if not self._skip:
                raise InputError(_bad_logits(self._teacher, keys_3N[1:, bad_N], error)) from error
        self.bad_rows += int(bad_N.sum())
        return self._draw(logits_NC, keys_3N, keep_N & ~bad_N)

    def _draw(
        self, logits_NC: torch.Tensor, keys_3N: npt.NDArray[np.int64], keep_N: npt.NDArray[np.bool_]
    ) -> torch_targets.SparseTargets:
        spec, device, rows = self._spec, logits_NC.device, len(keep_N)
        kept = None if keep_N.all() else torch.from_numpy(np.flatnonzero(keep_N)).to(device)
        keys = torch.from_numpy(keys_3N[:, keep_N])
        labels_N, sequence_N, row_N = keys.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else keys
        draw = sample
        if self._teacher.sharded:
            draw = partial(sample_sharded, vocab_start=self._teacher.ids_here[0], vocab_size=self._teacher.vocab_size)
        targets = draw(
            logits_NC if kept is None else logits_NC[kept],
            labels_N,
            kind=spec.kind,
            draws=spec.draws,
            seed=spec.seed,
            sequence_N=sequence_N,
            row_N=row_N,
            exponent=spec.exponent,
            top_p=spec.top_p,
        )
        return targets if kept is None else spread(targets, kept, rows)

    def _room(self, length: int, device: torch.device) -> torch.Tensor:
        """The one buffer of logits, `[N, C]`: at least one piece, at most a batch."""
        if self._logits_NC is None:
            rows = piece_rows(length, self._teacher.vocab_size, device)
            most = LOGITS_BYTES.get(device.type, LOGITS_BYTES["cpu"]) // (4 * self._teacher.vocab_size)
            rows = max(rows, min(most, self.batch_size * length))
            start, stop = self._teacher.ids_here
            self._logits_NC = torch.empty(rows, stop - start, device=device)
        return self._logits_NC

    def _beside(self, flight: _Flight) -> AbstractContextManager[Any]:
        """The side stream, behind the batch's body."""
        if flight.ready is None:
            return nullcontext()
        if self._side is None:
            self._side = torch.cuda.Stream(flight.states_BLX.device)  # type: ignore[no-untyped-call]
        self._side.wait_event(flight.ready)
        flight.states_BLX.record_stream(self._side)
        return torch.cuda.stream(self._side)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self._teacher.group is not None:  # the others are inside the batch and can not go back
            raise InputError(
                f"teacher {self._teacher.name} ran out of memory with {self.batch_size} sequences a batch in a process of "
                f"{self._teacher.group.size}: lower --batch-size or --seq-len, or raise --tensor-parallel"
            ) from error
        if self.notes or self.batch_size == 1:
            raise InputError(
                f"teacher {self._teacher.name} ran out of memory with {self.batch_size} sequences a batch: "
                "lower --batch-size or --seq-len, or spread the teacher with --device-map auto"
            ) from error
        note = f"out of memory with {self.batch_size} sequences a batch: going on with {self.batch_size // 2}"
        self.batch_size //= 2
        self.notes.append(note)
        log.warning(note)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def sample_sequences(
    teacher: Teacher, spec: SamplerSpec, tokens_BL1: npt.NDArray[np.uint32], first_sequence: int, *, batch_size: int
) -> list[SparseTargets]:
    """Targets of sequences that follow each other, one `SparseTargets` of `L` rows each, exact (not yet coded).

    Args:
        teacher: who speaks.
        spec: how its distribution is thinned.
        tokens_BL1: `[B, L+1]` token ids.
        first_sequence: index in the corpus of the first of them: part of the generator's key.
        batch_size: the one batch shape of the run; a shorter batch is padded to it.

    Raises:
        InputError: the teacher's logits hold NaN or nothing finite, naming sequence and row.
    """
    rows = tokens_BL1.shape[1] - 1
    sampling = Sampling(teacher, spec, batch_size=batch_size)
    return [
        targets.slice_rows(index * rows, (index + 1) * rows)
        for batch, targets in sampling(Batch(first_sequence, tokens_BL1).split(batch_size))
        for index in range(len(batch))
    ]


def _follow(teacher: Teacher, spec: SamplerSpec, batches: list[Batch], *, batch_size: int, skip_bad_rows: bool) -> None:
    """What the other processes that hold a teacher do while the first samples `batches`: the same."""
    for _ in Sampling(teacher, spec, batch_size=batch_size, skip_bad_rows=skip_bad_rows)(batches):
        pass


def _bad_logits(teacher: Teacher, where_2N: npt.NDArray[np.int64], error: ValueError) -> str:
    sequence, row = where_2N[:, 0]
    others = f" and {where_2N.shape[1] - 1} more rows near it" if where_2N.shape[1] > 1 else ""
    return (
        f"teacher {teacher.name} gave logits that are NaN or infinite at sequence {sequence}, row {row}{others}: "
        "check the checkpoint, run it with --dtype float32, or leave such rows out with --skip-bad-rows"
    )
