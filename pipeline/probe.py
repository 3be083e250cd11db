"""A few hundred rows of the corpus' beginning with the teacher's whole logits: what can be asked again for other samplers.

The rows are spread evenly over the sequences, since neighbours resemble each other, and keep their place in the corpus: the
run gives the same row the same target.

Shapes: `P` probe rows, `V` vocabulary, `L` rows of a sequence, `E` entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillroom.kernels.sample import STREAM_ROUNDING, sample, uniforms
from stillroom.pipeline.host import to_host
from stillroom.pipeline.packing import PackedCorpus
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import Manifest, PackingInfo
from stillroom.storage.segments import positions_of
from stillroom.storage.sizes import bytes_of_rows
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets

PROBE_SEQUENCES: Final = 16
PROBE_ELEMENTS: Final = 1 << 26  # logits kept, 256 MiB
PROBE_ROWS: Final = 2048  # at most


@dataclass(frozen=True, slots=True)
class Probe:
    """Logits of rows spread over the first sequences, and the rows' places."""

    logits_PV: Tensor
    labels_P: Tensor
    sequence_P: Tensor
    row_P: Tensor

    @property
    def rows(self) -> int:
        """Number of rows `P`."""
        return len(self.labels_P)

    def sample(self, spec: SamplerSpec) -> SparseTargets:
        """The targets the run gives these rows under `spec`."""
        targets = sample(
            self.logits_PV,
            self.labels_P,
            kind=spec.kind,
            draws=spec.draws,
            seed=spec.seed,
            sequence_N=self.sequence_P,
            row_N=self.row_P,
            exponent=spec.exponent,
            top_p=spec.top_p,
        )
        return to_host(targets)

    def bytes_of(self, manifest: Manifest, spec: SamplerSpec, targets: SparseTargets) -> float:
        """Bytes per row of `targets` as one sequence of `P` rows; a shard's fixed part is in it, so take differences."""
        one = replace(
            manifest, sampler=spec, packing=PackingInfo(seq_len=self.rows), sequences=1, sequences_per_shard=1
        )
        tokens_1L1 = torch.cat((self.labels_P[:1], self.labels_P)).cpu().numpy().astype(np.uint32)[None]
        rounding_P3: npt.NDArray[np.float64] = uniforms(
            spec.seed, self.sequence_P.cpu(), self.row_P.cpu(), stream=STREAM_ROUNDING, count=3
        ).numpy()
        return bytes_of_rows(one, tokens_1L1, targets, rounding_P3) / self.rows


def probe(teacher: Teacher, corpus: PackedCorpus, *, batch_size: int) -> Probe:
    """Run the teacher over the first sequences and keep the logits of rows spread over them.

    Args:
        teacher: who speaks.
        corpus: of at least one sequence; rows outside its loss mask are passed over.
        batch_size: sequences per forward, as in the run.

    Raises:
        InputError: the first sequences have no row that gets a target.
    """
    corpus = _beginning(corpus)
    teacher.together(probe, corpus, batch_size=batch_size)
    tokens_SL1 = np.ascontiguousarray(corpus.tokens_SL1)
    sequences, seq_len = len(tokens_SL1), tokens_SL1.shape[1] - 1
    room = min(PROBE_ROWS, PROBE_ELEMENTS // teacher.vocab_size)
    each = max(1, min(seq_len, room // sequences))
    logits, labels, sequence, row = [], [], [], []
    for begin in range(0, sequences, batch_size):
        batch = torch.from_numpy(tokens_SL1[begin : begin + batch_size].astype(np.int64))
        count = len(batch)
        padded = batch if count == batch_size else torch.cat([batch, batch[:1].expand(batch_size - count, -1)])
        positions_BL = None
        if corpus.starts_SL1 is not None:
            places = np.resize(np.arange(begin, begin + count), batch_size)  # a short batch is padded with any sequence
            positions_BL = torch.from_numpy(positions_of(corpus.starts_SL1[places]))
        states_BLX = teacher.body(padded[:, :-1], positions_BL)
        for index in range(count):
            kept = np.arange(seq_len) if corpus.mask_SL is None else np.flatnonzero(corpus.mask_SL[begin + index])
            few = min(each, len(kept))
            rows = torch.from_numpy(kept[np.arange(few) * len(kept) // max(1, few)])
            logits.append(teacher.whole(teacher.head(states_BLX[index][rows.to(states_BLX.device)])))
            labels.append(batch[index, rows + 1])
            sequence.append(torch.full_like(rows, begin + index))
            row.append(rows)
    if not sum(map(len, row)):
        raise InputError(
            f"the first {sequences} sequences have no token of the assistant's, so nothing can be measured on them: "
            "shuffle the corpus, or give numbers instead"
        )
    logits_PV = torch.cat(logits)
    return Probe(logits_PV, *(torch.cat(parts).to(logits_PV.device) for parts in (labels, sequence, row)))


def _beginning(corpus: PackedCorpus) -> PackedCorpus:
    first = slice(PROBE_SEQUENCES)
    return replace(
        corpus,
        tokens_SL1=corpus.tokens_SL1[first],
        mask_SL=None if corpus.mask_SL is None else corpus.mask_SL[first],
        starts_SL1=None if corpus.starts_SL1 is None else corpus.starts_SL1[first],
    )
