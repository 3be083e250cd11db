"""Held-out measures of a student, beside its teacher if given; one pass, streaming counters, float32 softmax.

Shapes: `S` sequences, `B` of a batch, `L` positions, `N` rows of a chunk, `V` vocabulary both models have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from stillroom.kernels.dense_kd import LOWEST_LOGP
from stillroom.storage.errors import InputError
from stillroom.train.data import TokenDataset
from stillroom.train.student import (
    ModelInfo,
    check_length,
    check_tokenizers,
    find_model,
    find_tokenizer,
    load_model,
)
from stillroom.train.targets import LiveTeacher

BINS: Final = 15
CHUNK_ELEMENTS: Final = 1 << 22  # logits in work at a time


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over held-out rows.

    Attributes:
        rows: how many.
        lm_loss: cross-entropy with the text, nats per token.
        perplexity: exp(lm_loss).
        ece: expected calibration error of the top-1 probability over 15 bins ((b/15, (b+1)/15]).
        kl: KL(teacher || student) over the shared vocabulary, nats.
        top1_agreement: share of rows where both rank the same token first.
        acceptance: mean of sum_v min(p_v, q_v): how often speculative decoding would take the student's token.
        teacher_lm_loss: the teacher's own cross-entropy with the text.
    """

    rows: int
    lm_loss: float
    perplexity: float
    ece: float
    kl: float | None = None
    top1_agreement: float | None = None
    acceptance: float | None = None
    teacher_lm_loss: float | None = None


def evaluate(
    student: str | Path,
    *,
    tokens_SL1: npt.NDArray[np.integer],
    teacher: str | Path | None = None,
    rows: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a student on token sequences it has not been trained on.

    Where the two vocabularies differ in width, which is padding, the distributions are compared on the common range.

    Args:
        student: folder or hub id.
        tokens_SL1: `[S, L+1]` token ids.
        teacher: folder or hub id; without it the last four figures are None.
        rows: take the first so many rows, rounded up to whole sequences.
        batch_size: sequences per forward; changes speed only.
        on_progress: told (sequences done, sequences in all).

    Raises:
        InputError: a model that cannot be used, sequences too long for it, or ids outside its vocabulary.
    """
    source = TokenDataset(tokens_SL1)
    sequences = len(source) if rows is None else min(len(source), max(1, math.ceil(rows / source.seq_len)))
    models = {"student": _find(str(student), "student", source.seq_len)}
    if teacher is not None:
        models["teacher"] = _find(str(teacher), "teacher", source.seq_len)
        folders = [find_tokenizer(Path(m.name)) for m in models.values()]
        check_tokenizers(folders[0], folders[1], roles=("student", "teacher"))
    vocab_size = min(m.vocab_size for m in models.values())
    if not 0 <= int(tokens_SL1.min()) <= int(tokens_SL1.max()) < vocab_size:
        raise InputError(
            f"token ids run from {tokens_SL1.min()} to {tokens_SL1.max()}, wanted 0 to {vocab_size - 1}, the vocabulary of the "
            "models: cut the text with their tokenizer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = [LiveTeacher(load_model(m, role=r).eval().to(device), vocab_size) for r, m in models.items()]
    counts = _Counts()
    for start in range(0, sequences, batch_size):
        stop = min(start + batch_size, sequences)
        batch = source.__getitems__(list(range(start, stop))).to(device)
        chunks = zip(*(_chunks(model.logits(batch)) for model in loaded), strict=True)
        labels = torch.split(batch.labels_BL.flatten(), _chunk_rows(vocab_size))
        for label_N, logits in zip(labels, chunks, strict=True):
            counts.add(label_N, *logits)
        on_progress(stop, sequences)
    return counts.evaluation(with_teacher=teacher is not None)


def calibration_error(bins_3: npt.NDArray[np.float64]) -> float:
    """Expected calibration error from `[3, bins]`: rows, summed confidence and hits of each bin."""
    rows, confidence, hits = bins_3
    return float(np.abs(confidence - hits).sum() / rows.sum())


@final
class _Counts:
    """Sums over rows, in float64."""

    def __init__(self) -> None:
        self._rows = 0
        self._sums = np.zeros(5)  # lm_loss, kl, agreement, acceptance, teacher's lm_loss
        self._bins = np.zeros((3, BINS))

    def add(self, label_N: torch.Tensor, student_NV: torch.Tensor, teacher_NV: torch.Tensor | None = None) -> None:
        logq_NV = functional.log_softmax(student_NV, dim=-1, dtype=torch.float32)
        top_N, guess_N = logq_NV.max(-1)
        confidence_N = top_N.double().exp()
        hit_N = (guess_N == label_N).double()
        bin_N = (confidence_N * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
        for row, weight_N in enumerate((torch.ones_like(hit_N), confidence_N, hit_N)):
            self._bins[row] += torch.bincount(bin_N, weight_N, minlength=BINS).cpu().numpy()
        self._rows += len(label_N)
        self._sums[0] -= _total(logq_NV.gather(-1, label_N[:, None]))
        if teacher_NV is None:
            return
        logp_NV = functional.log_softmax(teacher_NV, dim=-1, dtype=torch.float32).clamp_(min=LOWEST_LOGP)
        p_NV = logp_NV.exp()
        self._sums[4] -= _total(logp_NV.gather(-1, label_N[:, None]))
        self._sums[2] += _total(logp_NV.argmax(-1) == guess_N)
        self._sums[3] += _total(torch.minimum(p_NV, logq_NV.exp()).sum(-1))
        self._sums[1] += _total(torch.linalg.vecdot(p_NV, logp_NV.sub_(logq_NV.clamp_(min=LOWEST_LOGP))))

    def evaluation(self, *, with_teacher: bool) -> Evaluation:
        lm_loss, kl, agreement, acceptance, teacher_lm_loss = (float(s) for s in self._sums / self._rows)
        return Evaluation(
            rows=self._rows,
            lm_loss=lm_loss,
            perplexity=math.exp(min(lm_loss, 700.0)),
            ece=calibration_error(self._bins),
            kl=kl if with_teacher else None,
            top1_agreement=agreement if with_teacher else None,
            acceptance=acceptance if with_teacher else None,
            teacher_lm_loss=teacher_lm_loss if with_teacher else None,
        )


def _find(name: str, role: str, seq_len: int) -> ModelInfo:
    model = find_model(name, role=role)
    if not model.has_weights:
        raise InputError(f"{role} {name} has a configuration but no weights: give a trained model")
    check_length(model, seq_len, role=role)
    return model


def _chunk_rows(vocab_size: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocab_size)


def _chunks(logits_NV: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(logits_NV, _chunk_rows(logits_NV.shape[1]))


def _total(x: torch.Tensor) -> float:
    return float(x.sum(dtype=torch.float64))
