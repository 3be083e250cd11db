"""Held-out measures of a student, beside its teacher if given, or beside what a cache keeps of it; one pass.

Shapes: `S` sequences, `B` of a batch, `L` positions, `N` rows of a chunk, `V` vocabulary both models have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from stillroom.kernels.targets import SparseTargets
from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import DOCUMENTS
from stillroom.train.batch import Batch
from stillroom.train.data import CacheDataset, TokenDataset
from stillroom.train.figures import Counter, Rows, ShelfCounter, StudentCounter, TeacherCounter
from stillroom.train.student import (
    ModelInfo,
    check_documents,
    check_length,
    check_tokenizers,
    find_model,
    find_tokenizer,
    load_model,
)
from stillroom.train.targets import LiveTeacher

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
        top1_rows: rows that `top1_agreement` is a mean over, where these are not all but those whose first choice the cache
            keeps.
        sampled: the fields above that are estimates from a cache's sampled targets, not exact.
    """

    rows: int
    lm_loss: float
    perplexity: float
    ece: float
    kl: float | None = None
    top1_agreement: float | None = None
    acceptance: float | None = None
    teacher_lm_loss: float | None = None
    top1_rows: int | None = None
    sampled: tuple[str, ...] = ()


def evaluate(
    student: str | Path,
    *,
    tokens_SL1: npt.NDArray[np.integer] | None = None,
    cache: Cache | None = None,
    teacher: str | Path | None = None,
    rows: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a student on token sequences, or on sequences of a cache, that it has not been trained on.

    A cache gives what training would read of it: models get the positions they were to get, rows outside the loss mask do not
    count. Without a live teacher its targets stand in for one (`ShelfCounter` says how well).

    Where the two vocabularies differ in width, which is padding, the distributions are compared on the common range; with a
    cache, on its vocabulary.

    Args:
        student: folder or hub id.
        tokens_SL1: `[S, L+1]` token ids; or
        cache: an open cache.
        teacher: folder or hub id; without it and without a cache the figures of the teacher are None.
        rows: take the first so many rows, rounded up to whole sequences.
        batch_size: sequences per forward; changes speed only.
        on_progress: told (sequences done, sequences in all).

    Raises:
        InputError: a model that cannot be used, sequences too long for it, ids outside its vocabulary, or no row that counts.
        CacheError: a cache that cannot be read.
    """
    if (tokens_SL1 is None) == (cache is None):
        raise InputError("evaluate came with tokens and a cache, or with neither: give one of them")
    source: TokenDataset | CacheDataset
    if cache is None:
        assert tokens_SL1 is not None
        source = TokenDataset(tokens_SL1)
    else:
        source = CacheDataset(cache)
    sequences = len(source) if rows is None else min(len(source), max(1, math.ceil(rows / source.seq_len)))
    models = {"student": _find(str(student), "student", source.seq_len)}
    if teacher is not None:
        models["teacher"] = _find(str(teacher), "teacher", source.seq_len)
    _check_tokenizers(models, cache)
    vocab_size = _vocabulary(models, tokens_SL1, cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = []
    for role, found in models.items():
        model = load_model(found, role=role).eval().to(device)
        if cache is not None and cache.manifest.packing.policy == DOCUMENTS:
            check_documents(model, found, role=role)
        loaded.append(LiveTeacher(model, vocab_size))
    student_counter = StudentCounter()
    counters: list[Counter] = [student_counter]
    if teacher is not None:
        counters.append(TeacherCounter())
    elif cache is not None:
        counters.append(ShelfCounter(cache.manifest.sampler))
    for start in range(0, sequences, batch_size):
        stop = min(start + batch_size, sequences)
        batch = source.__getitems__(list(range(start, stop))).to(device)
        for chunk in _rows_of(batch, [model.logits(batch) for model in loaded], _chunk_rows(vocab_size)):
            for counter in counters:
                counter.add(chunk)
        on_progress(stop, sequences)
    if not student_counter.rows:
        raise InputError(
            f"no row of the first {sequences} sequences has a target, so there is nothing to measure: take more"
        )
    return Evaluation(**{name: value for counter in counters for name, value in counter.figures().items()})


def _rows_of(batch: Batch, logits: list[torch.Tensor], chunk_rows: int) -> Iterator[Rows]:
    """The rows of a batch that count, a chunk at a time; `logits` of the student, then of the teacher if there is one."""
    label_N, mask_N = batch.labels_BL.flatten(), batch.mask_BL.flatten()
    for start in range(0, len(label_N), chunk_rows):
        part = slice(start, start + chunk_rows)
        counts_N = mask_N[part]
        if not counts_N.any():
            continue
        student_NV, *teacher_NV = (x[part] if counts_N.all() else x[part][counts_N] for x in logits)
        logq_NV = functional.log_softmax(student_NV, dim=-1, dtype=torch.float32)
        targets = None if batch.targets is None else _targets_of(batch.targets, start, counts_N)
        yield Rows(label_N[part][counts_N], logq_NV, logq_NV.argmax(-1), next(iter(teacher_NV), None), targets)


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


def _check_tokenizers(models: dict[str, ModelInfo], cache: Cache | None) -> None:
    folders = {role: find_tokenizer(Path(model.name)) for role, model in models.items()}
    if cache is not None:
        folders["cache"] = find_tokenizer(cache.path / "tokenizer")
    roles = list(folders)
    for index, role in enumerate(roles):
        for other in roles[index + 1 :]:
            check_tokenizers(folders[role], folders[other], roles=(role, other))


def _vocabulary(models: dict[str, ModelInfo], tokens_SL1: npt.NDArray[np.integer] | None, cache: Cache | None) -> int:
    """Columns of the logits that are compared."""
    if cache is not None:
        vocab_size = cache.manifest.vocab_size
        for role, model in models.items():
            if model.vocab_size < vocab_size:
                raise InputError(
                    f"{role} {model.name} has a vocabulary of {model.vocab_size}, the cache's is {vocab_size}: give a {role} "
                    "with the cache's tokenizer and at least its vocabulary"
                )
        return vocab_size
    vocab_size = min(m.vocab_size for m in models.values())
    if tokens_SL1 is not None and not 0 <= int(tokens_SL1.min()) <= int(tokens_SL1.max()) < vocab_size:
        raise InputError(
            f"token ids run from {tokens_SL1.min()} to {tokens_SL1.max()}, wanted 0 to {vocab_size - 1}, the vocabulary of the "
            "models: cut the text with their tokenizer"
        )
    return vocab_size


def _find(name: str, role: str, seq_len: int) -> ModelInfo:
    model = find_model(name, role=role)
    if not model.has_weights:
        raise InputError(f"{role} {name} has a configuration but no weights: give a trained model")
    check_length(model, seq_len, role=role)
    return model


def _chunk_rows(vocab_size: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocab_size)
