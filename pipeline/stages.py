"""What is done to a batch of sequences: teacher, sampler, host.

Shapes: `B` sequences of a batch, `L` rows per sequence, `V` vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from stillroom.kernels import targets as torch_targets
from stillroom.kernels.sample import sample
from stillroom.pipeline.teacher import Teacher
from stillroom.storage.errors import InputError
from stillroom.storage.spec import SamplerSpec
from stillroom.storage.targets import SparseTargets


def sample_sequences(
    teacher: Teacher, spec: SamplerSpec, tokens_BL1: npt.NDArray[np.uint32], first_sequence: int, *, batch_size: int
) -> list[SparseTargets]:
    """Targets of up to `batch_size` sequences, one `SparseTargets` of `L` rows each, exact (not yet coded).

    Args:
        teacher: who speaks.
        spec: how its distribution is thinned.
        tokens_BL1: `[B, L+1]` token ids.
        first_sequence: index in the corpus of the first of them: part of the generator's key.
        batch_size: the one batch shape of the run; a shorter batch is padded to it.

    Raises:
        InputError: the teacher's logits hold NaN or nothing finite, naming the sequence.
    """
    tokens = torch.from_numpy(tokens_BL1.astype(np.int64))
    count, rows = len(tokens), tokens.shape[1] - 1
    padded = tokens if count == batch_size else torch.cat([tokens, tokens[:1].expand(batch_size - count, -1)])
    row_N = torch.arange(rows, device=teacher.device)
    parts: list[SparseTargets] = []
    for index, logits_LV in enumerate(teacher.logits(padded[:, :-1])):
        if index == count:
            break
        try:
            targets = sample(
                logits_LV,
                tokens[index, 1:].to(teacher.device),
                kind=spec.kind,
                draws=spec.draws,
                seed=spec.seed,
                sequence_N=torch.full_like(row_N, first_sequence + index),
                row_N=row_N,
                exponent=spec.exponent,
                top_p=spec.top_p,
            )
        except ValueError as error:
            raise InputError(
                f"teacher {teacher.name} can not be sampled at sequence {first_sequence + index} ({error}): "
                "check the checkpoint, or run it with --dtype float32"
            ) from error
        parts.append(to_numpy(targets))
    return parts


def to_numpy(targets: torch_targets.SparseTargets) -> SparseTargets:
    """The storage twin of sampled targets, on the host."""
    arrays = {
        name: None if (tensor := getattr(targets, name)) is None else tensor.cpu().numpy()
        for name in ("offsets", "ids", "weights", "label_logp", "entropy", "logp")
    }
    return SparseTargets(**arrays)  # type: ignore[arg-type]  # the six fields, by name
