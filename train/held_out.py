"""One pass over held-out sequences: batches in, sums out. `evaluate` and the watch of a run share it.

Shapes: `B` sequences of a batch, `L` positions, `N` rows of a chunk, `V` vocabulary both models have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch.nn import functional

from stillroom.kernels.targets import SparseTargets
from stillroom.train.batch import Batch
from stillroom.train.figures import Measure, Rows
from stillroom.train.targets import LiveTeacher
from stillroom.train.views import Sums

CHUNK_ELEMENTS: Final = 1 << 22  # logits in work at a time


def add_batch(
    batch: Batch, first: int, models: Sequence[LiveTeacher], measures: Sequence[Measure], sums: Sequence[Sums]
) -> None:
    """Put the rows of a batch that count into sums.

    Args:
        batch: on the models' device.
        first: number of its first sequence; the others follow.
        models: the student, then the teacher if there is one.
        measures: figures of a row.
        sums: where they go.
    """
    logits = [model.logits(batch) for model in models]
    for rows in _rows_of(batch, first, logits, max(1, CHUNK_ELEMENTS // models[0].vocab_size)):
        values = {name: value_N for measure in measures for name, value_N in measure(rows).items()}
        for one in sums:
            one.add(rows, values)


def _rows_of(batch: Batch, first: int, logits: list[torch.Tensor], chunk_rows: int) -> Iterator[Rows]:
    """The rows of a batch that count, a chunk at a time; `logits` of the student, then of the teacher if there is one."""
    label_N, mask_N = batch.labels_BL.flatten(), batch.mask_BL.flatten()
    place_N = torch.arange(len(label_N), device=label_N.device)
    seq_len = batch.labels_BL.shape[1]
    position_N = place_N % seq_len if batch.positions_BL is None else batch.positions_BL.flatten()
    for start in range(0, len(label_N), chunk_rows):
        part = slice(start, start + chunk_rows)
        counts_N = mask_N[part]
        if not counts_N.any():
            continue
        student_NV, *teacher_NV = (x[part] if counts_N.all() else x[part][counts_N] for x in logits)
        logq_NV = functional.log_softmax(student_NV, dim=-1, dtype=torch.float32)
        targets = None if batch.targets is None else _targets_of(batch.targets, start, counts_N)
        yield Rows(
            label_N[part][counts_N],
            logq_NV,
            logq_NV.argmax(-1),
            position_N[part][counts_N],
            first + place_N[part][counts_N] // seq_len,
            next(iter(teacher_NV), None),
            targets,
        )


def _targets_of(targets: SparseTargets, start: int, counts_N: torch.Tensor) -> SparseTargets:
    """Rows from `start` on, those that count; the others have no entries."""
    stop = start + len(counts_N)
    first, last = int(targets.offsets[start]), int(targets.offsets[stop])
    sizes_N = targets.offsets[start : stop + 1].diff()[counts_N]
    return SparseTargets(
        functional.pad(sizes_N.cumsum(0), (1, 0)),
        targets.ids[first:last],
        targets.weights[first:last],
        targets.label_logp[start:stop][counts_N],
        targets.entropy[start:stop][counts_N],
        None if targets.logp is None else targets.logp[first:last],
    )
