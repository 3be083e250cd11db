"""What a run evaluates on while it trains: a cache it does not train on, or text; found and checked with the plan.

Shapes: `S` sequences, `L` positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillroom.storage.cache import Cache, open_cache
from stillroom.storage.errors import InputError
from stillroom.storage.manifest import DOCUMENTS
from stillroom.train.around import ReducedVocabulary
from stillroom.train.config import TrainConfig
from stillroom.train.data import CacheDataset, Source, TokenDataset
from stillroom.train.figures import Measure, OfShelf, OfStudent, OfTeacher
from stillroom.train.student import ModelInfo, check_length


@dataclass(frozen=True, slots=True)
class HeldOutData:
    """Held-out sequences of a run.

    Attributes:
        source: the sequences.
        sequences: the first so many are evaluated.
        measures: figures of a row; with a live teacher they ask it.
        notes: sentences the user should read once.
    """

    source: Source
    sequences: int
    measures: tuple[Measure, ...]
    notes: tuple[str, ...] = ()


def open_held_out(
    config: TrainConfig,
    caches: tuple[Cache, ...],
    student: ModelInfo,
    vocab_size: int,
    tokens_SL1: npt.NDArray[np.integer] | None,
) -> HeldOutData | None:
    """Open what `config` evaluates on, if anything.

    Args:
        config: settings.
        caches: those the run trains on.
        student: whose positions must suffice.
        vocab_size: columns of the logits that take part.
        tokens_SL1: the text of `eval_data`, cut and packed.

    Raises:
        InputError: a held-out cache that is trained on, or that does not go with the run's.
        CacheError: a cache that cannot be read.
    """
    if config.eval_cache is None and config.eval_data is None and tokens_SL1 is None:
        return None
    if config.eval_cache is not None and (config.eval_data is not None or tokens_SL1 is not None):
        raise InputError("held-out rows came as eval_cache and as eval_data: give one of them")
    live: tuple[Measure, ...] = () if config.teacher is None else (OfTeacher(),)
    notes: tuple[str, ...] = ()
    source: Source
    if config.eval_cache is None:
        source = _text(caches, tokens_SL1, vocab_size)
        measures = (OfStudent(), *live)
    else:
        cache = open_cache(config.eval_cache, cache_dir=config.cache_dir, cache_bytes=config.cache_bytes)
        if config.id_map is None:
            _check(cache, caches, vocab_size)
            source, measures = CacheDataset(cache), (OfStudent(), *(live or (OfShelf(cache.manifest.sampler),)))
        else:
            _check(cache, caches, caches[0].manifest.vocab_size)
            source = ReducedVocabulary(
                CacheDataset(cache), config.id_map, unknown=config.unknown_id, vocab_size=cache.manifest.vocab_size,
                student_ids=student.vocab_size,
            )  # fmt: skip
            measures = (OfStudent(),)
            notes = ("held-out figures are of the student alone: with an id map no KL to the teacher is known",)
        if caches and all(cache.manifest.teacher.fingerprint != c.manifest.teacher.fingerprint for c in caches):
            notes = (*notes, f"eval_cache {config.eval_cache} is of another teacher than the run's caches")
    check_length(student, source.seq_len, role="student")
    sequences = min(len(source), math.ceil(config.eval_rows / source.seq_len))
    return HeldOutData(source, sequences, measures, notes)


def _text(caches: tuple[Cache, ...], tokens_SL1: npt.NDArray[np.integer] | None, vocab_size: int) -> TokenDataset:
    if tokens_SL1 is None:
        raise InputError(
            "eval_data names text, which the command `stillroom train` packs: give eval_tokens_SL1 in Python"
        )
    if any(cache.manifest.packing.policy == DOCUMENTS for cache in caches):
        raise InputError(
            "eval_data is packed end to end and the run's cache by documents: make a held-out cache and give --eval-cache"
        )
    source = TokenDataset(tokens_SL1)
    if not 0 <= int(tokens_SL1.min()) <= int(tokens_SL1.max()) < vocab_size:
        raise InputError(
            f"held-out token ids run from {tokens_SL1.min()} to {tokens_SL1.max()}, wanted 0 to {vocab_size - 1}: cut the text "
            "with the student's tokenizer"
        )
    return source


def _check(cache: Cache, caches: tuple[Cache, ...], vocab_size: int) -> None:
    made = cache.manifest
    if not caches and made.packing.policy == DOCUMENTS:
        raise InputError(
            f"eval_cache {cache.path} is packed by {made.packing.policy} and the run's tokens are read whole: make one with "
            "--packing concat"
        )
    if made.vocab_size != vocab_size:
        raise InputError(
            f"eval_cache {cache.path} has a vocabulary of {made.vocab_size}, the run's is {vocab_size}: make it with the same "
            "teacher and settings"
        )
    for other in (other.manifest for other in caches):
        if made.corpus.fingerprint == other.corpus.fingerprint:
            raise InputError(f"eval_cache {cache.path} holds the text the run trains on: make one of other text")
        for name, here, there in (
            ("tokenizer", made.tokenizer.fingerprint, other.tokenizer.fingerprint),
            ("packing", made.packing.policy, other.packing.policy),
        ):
            if here != there:
                raise InputError(
                    f"eval_cache {cache.path} and the run's cache differ in {name} ({here} and {there}): make it with the same "
                    "teacher and packing"
                )
