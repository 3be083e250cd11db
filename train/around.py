"""Sources that change what another source gives: the user's weights for rows, another vocabulary.

Shapes: `B` sequences, `L` positions, `S` sequences of the source, `E` entries, `W` ids of the teacher.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from torch.utils.data import Dataset

from stillroom.kernels.targets import SparseTargets
from stillroom.storage.cache import Follower
from stillroom.storage.errors import InputError
from stillroom.storage.stream import StreamOrder
from stillroom.train.batch import Batch
from stillroom.train.data import IGNORED, Source
from stillroom.train.validity import Kind

MEASURED_SEQUENCES: Final = 64  # read to say what a smaller vocabulary loses


class _Around(Dataset[Batch]):
    """What a source says of itself, passed on."""

    def __init__(self, inner: Source, told: bytes) -> None:
        self.inner = inner
        self._told = hashlib.sha256(told).hexdigest()

    @property
    def seq_len(self) -> int:
        """Rows per sequence, L."""
        return self.inner.seq_len

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the inner source's and of what is put around it."""
        return hashlib.sha256(f"{type(self).__name__} {self.inner.fingerprint} {self._told}".encode()).hexdigest()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequences of each shard."""
        return self.inner.lengths

    @property
    def kind(self) -> Kind | None:
        """What its targets are."""
        return self.inner.kind

    @property
    def default_window(self) -> int | None:
        """As the inner source's."""
        return self.inner.default_window

    def follow(self, order: StreamOrder) -> Follower | None:
        """As the inner source's."""
        return self.inner.follow(order)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        raise NotImplementedError


@final
class WithColumn(_Around):
    """A source whose rows carry a number each, `Batch.weight_BL`.

    Args:
        inner: the source.
        file: `.npy` of floats `[S, L]`, mapped, not read.

    Raises:
        InputError: another shape, or values that are no weights.
    """

    def __init__(self, inner: Source, file: Path) -> None:
        wanted = (len(inner), inner.seq_len)
        try:
            self.column_SL = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"row weights {file} can not be read ({error}): write them with numpy.save") from error
        if self.column_SL.shape != wanted or self.column_SL.dtype.kind != "f":
            raise InputError(
                f"row weights {file} came as {self.column_SL.dtype}{list(self.column_SL.shape)}, wanted floats {list(wanted)}: "
                "one for each row of each sequence"
            )
        digest = hashlib.sha256()
        total = 0.0
        for start in range(0, len(inner), 1024):
            part = np.ascontiguousarray(self.column_SL[start : start + 1024])
            if not np.isfinite(part).all() or (part < 0).any():
                raise InputError(f"row weights {file} hold a negative or non-finite one: wanted numbers from 0")
            digest.update(part.data)
            total += float(part.sum(dtype=np.float64))
        if total == 0.0:
            raise InputError(f"row weights {file} are all 0: nothing would be learnt")
        super().__init__(inner, digest.digest())

    def mean_power(self, power: float) -> float:
        """Mean over all rows of weight**power."""
        sums = [
            float(np.power(self.column_SL[start : start + 1024], power, dtype=np.float64).sum())
            for start in range(0, len(self), 1024)
        ]
        return sum(sums) / int(self.column_SL.size)

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = self.inner.__getitems__(indices)
        weight_BL = torch.from_numpy(self.column_SL[indices].astype(np.float32))
        return Batch(batch.tokens_BL, batch.labels_BL, batch.mask_BL, batch.targets, batch.positions_BL, weight_BL)


@final
class ReducedVocabulary(_Around):
    """A source as a student with fewer ids reads it.

    Tokens and targets are brought to the student's ids. A token it has no id for is read as `unknown`; a row whose label is
    such a token does not count; target entries of such ids are dropped and the others divided by their sum, so that the
    target is the teacher's distribution given the student's vocabulary.

    Args:
        inner: a source of the teacher's ids.
        file: `.npy` of integers `[W]`: the student's id of each of the teacher's, -1 for none.
        unknown: id read in the place of tokens the student lacks.
        vocab_size: ids of the teacher, W.
        student_ids: ids of the student.

    Raises:
        InputError: a map of another length, out of range, or that is not one to one.
    """

    def __init__(self, inner: Source, file: Path, *, unknown: int, vocab_size: int, student_ids: int) -> None:
        try:
            map_W = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"id map {file} can not be read ({error}): write it with numpy.save") from error
        if map_W.shape != (vocab_size,) or map_W.dtype.kind not in "iu":
            raise InputError(
                f"id map {file} came as {map_W.dtype}{list(map_W.shape)}, wanted integers [{vocab_size}]: the student's id for "
                "each of the teacher's, -1 for none"
            )
        used = map_W[map_W >= 0]
        if not len(used) or map_W.min() < -1 or used.max() >= student_ids or len(np.unique(used)) != len(used):
            raise InputError(
                f"id map {file} runs from {map_W.min()} to {map_W.max()} with {len(used)} ids, {len(np.unique(used))} of them "
                f"different; wanted -1, or each of the student's ids below {student_ids} once at most"
            )
        if not 0 <= unknown < student_ids:
            raise InputError(f"unknown_id came as {unknown}, wanted one of the student's ids, below {student_ids}")
        super().__init__(inner, map_W.astype("<i8").tobytes() + unknown.to_bytes(8, "little"))
        self.map_W, self.unknown = torch.from_numpy(map_W.astype(np.int64)), unknown

    @property
    def kind(self) -> Kind | None:
        """Targets given the vocabulary."""
        return None if self.inner.kind is None else "reduced vocabulary"

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = self.inner.__getitems__(indices)
        tokens_BL = self.map_W[batch.tokens_BL]
        labels_BL = torch.where(batch.mask_BL, self.map_W[batch.labels_BL.clamp(min=0)], IGNORED)
        mask_BL = batch.mask_BL & (labels_BL >= 0)
        return Batch(
            tokens_BL.masked_fill_(tokens_BL < 0, self.unknown),
            labels_BL.masked_fill_(~mask_BL, IGNORED),
            mask_BL,
            None if batch.targets is None else self._reduced(batch.targets)[0],
            batch.positions_BL,
            batch.weight_BL,
        )

    def lost(self) -> tuple[float, float]:
        """Share of rows that do not count any more, and mean mass the others' targets lose, over the first sequences."""
        batch = self.inner.__getitems__(list(range(min(len(self), MEASURED_SEQUENCES))))
        label_BL = self.map_W[batch.labels_BL.clamp(min=0)]
        kept_BL = batch.mask_BL & (label_BL >= 0)
        rows_lost = 1.0 - float(kept_BL.sum()) / max(1, int(batch.mask_BL.sum()))
        if batch.targets is None:
            return rows_lost, 0.0
        _, kept_R = self._reduced(batch.targets)
        return rows_lost, 1.0 - float(kept_R[kept_BL.flatten()].mean())

    def _reduced(self, targets: SparseTargets) -> tuple[SparseTargets, torch.Tensor]:
        """Targets in the student's ids, and the mass each row keeps."""
        row_E, id_E = targets.entry_rows(), self.map_W[targets.ids.long()]
        weight_E = torch.where(id_E >= 0, targets.weights, 0.0)
        kept_R = torch.zeros(targets.rows).index_add_(0, row_E, weight_E)
        keep_E = weight_E > 0
        counts_R = torch.zeros(targets.rows, dtype=torch.int64).index_add_(0, row_E, keep_E.to(torch.int64))
        reduced = SparseTargets(
            torch.cat((counts_R.new_zeros(1), counts_R.cumsum(0))),
            id_E[keep_E].to(torch.int32),
            (weight_E / torch.where(kept_R > 0, kept_R, 1.0)[row_E])[keep_E],
            targets.label_logp,
            targets.entropy,
        )
        return reduced, kept_R
