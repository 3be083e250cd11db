"""Held-out measures of a student, beside its teacher if given, or beside what a cache keeps of it; one pass.

Shapes: `S` sequences, `B` of a batch, `L` positions, `V` vocabulary both models have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers.utils import cached_file

from stillroom.storage.cache import Cache
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import DOCUMENTS
from stillroom.train.data import CacheDataset, TokenDataset
from stillroom.train.figures import Measure, OfShelf, OfStudent, OfTeacher
from stillroom.train.held_out import add_batch
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
from stillroom.train.token_bytes import bits_per_byte, token_bytes
from stillroom.train.views import (
    Bin,
    Group,
    Sums,
    by_confidence,
    by_label,
    by_position,
    calibration_error,
    frequency_groups,
    position_groups,
    reliability,
)

COUNTED_TOKENS: Final = 10_000_000  # of a cache, for the frequency of tokens


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
        bits_per_byte: of the text, where the tokenizer's tokens spell it (`token_bytes`).
        reliability: the curve whose gaps `ece` sums.
        by_frequency: by how often the label occurs, about a tenth of the rows each.
        by_position: by the row's position, in its document where the packing tells documents apart; powers of two.
        counted_tokens: how many tokens these occurrences are of: the evaluated labels, or a cache's.
        tasks: figures of lm-eval tasks, by task, where any were asked for.
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
    bits_per_byte: float | None = None
    reliability: tuple[Bin, ...] = ()
    by_frequency: tuple[Group, ...] = ()
    by_position: tuple[Group, ...] = ()
    counted_tokens: int = 0
    tasks: dict[str, dict[str, float]] | None = None


def evaluate(
    student: str | Path,
    *,
    tokens_SL1: npt.NDArray[np.integer] | None = None,
    cache: Cache | None = None,
    teacher: str | Path | None = None,
    rows: int | None = None,
    batch_size: int = 8,
    frequency_cache: Cache | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a student on token sequences, or on sequences of a cache, that it has not been trained on.

    A cache gives what training would read of it: models get the positions they were to get, rows outside the loss mask do not
    count. Without a live teacher its targets stand in for one (`OfShelf` says how well).

    Where the two vocabularies differ in width, which is padding, the distributions are compared on the common range; with a
    cache, on its vocabulary.

    Args:
        student: folder or hub id.
        tokens_SL1: `[S, L+1]` token ids; or
        cache: an open cache.
        teacher: folder or hub id; without it and without a cache the figures of the teacher are None.
        rows: take the first so many rows, rounded up to whole sequences.
        batch_size: sequences per forward; changes speed only.
        frequency_cache: count how often tokens occur in this cache, the student's training cache say, and not in what is
            evaluated; of a large one in 10 M tokens spread evenly.
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
    measures: list[Measure] = [OfStudent()]
    sampled: tuple[str, ...] = ()
    if teacher is not None:
        measures.append(OfTeacher())
    elif cache is not None:
        measures.append(shelf := OfShelf(cache.manifest.sampler))
        sampled = shelf.sampled
    count_V = None if frequency_cache is None else _occurrences(frequency_cache, models["student"], vocab_size)
    names = [name for measure in measures for name in measure.names]
    sums = [Sums(names, g, device) for g in (by_label(vocab_size), by_position(source.seq_len), by_confidence())]
    for start in range(0, sequences, batch_size):
        stop = min(start + batch_size, sequences)
        add_batch(source.__getitems__(list(range(start, stop))).to(device), start, loaded, measures, sums)
        on_progress(stop, sequences)
    at_label, at_position, at_confidence = sums
    total, rows_V = at_label.totals(), at_label.rows_G.cpu().numpy()
    if not rows_V.any():
        raise InputError(
            f"no row of the first {sequences} sequences has a target, so there is nothing to measure: take more"
        )
    figures: dict[str, Any] = total.figures(0)
    if teacher is None and "top1_agreement" in figures:
        figures.setdefault("top1_rows", figures["rows"])
    curve = reliability(at_confidence.totals(np.arange(len(at_confidence.rows_G)), len(at_confidence.rows_G)))
    spelt = _tokenizer_json(models["student"], cache)
    count_V = rows_V.astype(np.int64) if count_V is None else count_V
    return Evaluation(
        **figures,
        perplexity=math.exp(min(figures["lm_loss"], 700.0)),
        ece=calibration_error(curve),
        sampled=tuple(name for name in sampled if name in figures),
        bits_per_byte=bits_per_byte(figures["lm_loss"], rows_V, None if spelt is None else token_bytes(spelt)),
        reliability=curve,
        by_frequency=frequency_groups(at_label, count_V),
        by_position=position_groups(at_position),
        counted_tokens=int(count_V.sum()),
    )


def _occurrences(cache: Cache, student: ModelInfo, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id is a label in a cache, `[V]`."""
    at_cache = find_tokenizer(cache.path / "tokenizer")
    check_tokenizers(find_tokenizer(Path(student.name)), at_cache, roles=("student", "frequency cache"))
    many = min(len(cache), max(1, COUNTED_TOKENS // cache.manifest.packing.seq_len))
    index_S = np.unique(np.linspace(0, len(cache) - 1, many).astype(np.int64))
    count_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(index_S), 64):
        labels = cache.read(index_S[start : start + 64].tolist()).tokens[:, 1:]
        found = np.bincount(labels.ravel(), minlength=vocab_size)
        if len(found) > vocab_size:
            raise InputError(
                f"frequency cache {cache.path} holds the token id {len(found) - 1}, wanted ids below {vocab_size}, the "
                "vocabulary that is evaluated: give a cache of the student's tokenizer"
            )
        count_V += found
    return count_V


def _tokenizer_json(student: ModelInfo, cache: Cache | None) -> Path | None:
    """The file that says what the ids spell, if there is one: the student's, the cache's, or the hub's of the student."""
    folder = find_tokenizer(Path(student.name), None if cache is None else cache.path / "tokenizer")
    if folder is not None:
        file = folder / "tokenizer.json"
        return file if file.is_file() else None
    if Path(student.name).exists():
        return None
    found = cached_file(
        student.name, "tokenizer.json",
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else Path(found)


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
