"""Tokenise and pack: documents become sequences of `L` rows, `L + 1` token ids each.

Shapes: `S` sequences, `L` rows per sequence, `L1` = L + 1.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stillroom.pipeline.config import CorpusConfig
from stillroom.pipeline.corpus import documents
from stillroom.storage.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True, slots=True)
class PackedCorpus:
    """A corpus as the teacher will see it, and as every student will.

    Attributes:
        tokens_SL1: `[S, L+1]` uint32; the last id of a sequence is the first of the next, so every token after the first
            is the label of exactly one row.
        documents: number of documents read.
        fingerprint: SHA-256 over the packed ids: the same text under the same tokenizer and packing, whatever its files.
    """

    tokens_SL1: npt.NDArray[np.uint32]
    documents: int
    fingerprint: str


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how text becomes ids: the tokenizer's full JSON, or its vocabulary and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set by the last call's arguments, not by the tokenizer's identity.
        state["truncation"] = state["padding"] = None
        text = json.dumps(state, sort_keys=True)
    else:
        text = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def pack(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_progress: Callable[[int], None] = lambda documents: None,
) -> PackedCorpus:
    """Read, tokenise and pack the corpus (`concat`: documents end to end, each closed by the end-of-text id).

    Args:
        config: source, column, sequence length, number of sequences to keep.
        tokenizer: the teacher's.
        on_progress: told the number of documents tokenised so far.

    Raises:
        InputError: a source that can not be used, or text shorter than one sequence.
    """
    ids, count = [np.zeros(0, np.uint32)], 0
    length, wanted = 0, None if config.max_sequences is None else config.max_sequences * config.seq_len + 1
    for texts in _batches(documents(config), DOCUMENTS_PER_CALL):
        for document in _token_ids(tokenizer, texts):
            ids.append(document)
            length += len(document)
            count += 1
            if wanted is not None and length >= wanted:
                break
        on_progress(count)
        if wanted is not None and length >= wanted:
            break
    stream = np.concatenate(ids)
    sequences = (len(stream) - 1) // config.seq_len
    if config.max_sequences is not None:
        sequences = min(sequences, config.max_sequences)
    if count == 0:
        raise InputError(f"source {config.data} holds no text: every document is empty")
    if sequences < 1:
        raise InputError(
            f"source {config.data} gives {len(stream)} tokens, wanted at least {config.seq_len + 1} for one sequence: "
            "add text or lower --seq-len"
        )
    windows = np.lib.stride_tricks.sliding_window_view(stream, config.seq_len + 1)[:: config.seq_len]
    tokens_SL1 = np.ascontiguousarray(windows[:sequences])
    digest = hashlib.sha256(np.array(tokens_SL1.shape, "<i8").tobytes() + tokens_SL1.astype("<u4").tobytes())
    return PackedCorpus(tokens_SL1, documents=count, fingerprint=digest.hexdigest())


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[npt.NDArray[np.uint32]]:
    eos = tokenizer.eos_token_id
    # The tokenizer's own special tokens (a begin-of-text id, say) stay: they are what the teacher was trained with.
    encoded: Any = tokenizer(texts, return_attention_mask=False, verbose=False)
    for ids in encoded["input_ids"]:
        closed = ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
        yield np.asarray(closed, np.uint32)


def _batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
